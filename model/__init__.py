"""What Gemma is: sizes, tensors, forward pass. Knows no file format."""
