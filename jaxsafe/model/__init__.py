"""What a model is: its configuration, its weights, its taps and its forward pass."""
