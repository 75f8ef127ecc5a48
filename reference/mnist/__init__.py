"""The MNIST reference: a network steered to recognise digits that it was never trained on, in four experiments."""
