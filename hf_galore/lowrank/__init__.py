"""The arithmetic of GaLore: pure functions on tensors, which know no optimizer and no model."""
