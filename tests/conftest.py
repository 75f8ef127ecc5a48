"""The tests' models are small: one thread is the fastest, and leaves the other cores alone."""

import torch

torch.set_num_threads(1)
