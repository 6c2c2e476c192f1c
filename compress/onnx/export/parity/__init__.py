"""The parity gate: a written graph must compute what the torch model computes."""
