"""Settings of the whole suite."""

import torch

# The models here are tiny: more threads cost more than they save (a pipeline suite went from 214 s to 70 s with one).
torch.set_num_threads(1)
