"""`crocodil plan`: what a training run needs, found by running its real step on tensors without content."""
