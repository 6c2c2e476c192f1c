"""Pure tensor functions: tensors in, tensors out, unreduced, no model, no device choice; imports torch alone."""
