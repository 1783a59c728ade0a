"""What happens during the backward pass: hooks, low-rank gradients, and the projected backward of linear layers."""
