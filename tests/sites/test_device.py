"""brought: nobody waits for what comes from the CPU, but where torch would lose it."""

import pytest
import torch

from actsteer.sites.device import brought


class Asked(torch.Tensor):
    """Notes how it is to be copied, and stays where it is."""

    def to(self, **how):
        self.how = how
        return self


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("meta", False), ("mps", True), ("mps:0", True)])
def test_a_copy_from_the_cpu_waits_on_mps_alone(device, waits):
    tensor = torch.ones(2).as_subclass(Asked)
    how = brought(tensor, torch.device(device)).how
    assert how == {"device": torch.device(device), "dtype": torch.float32, "non_blocking": not waits}


def test_a_copy_to_the_cpu_is_there_when_it_is_given():
    tensor = torch.ones(2, device="meta").as_subclass(Asked)
    assert not brought(tensor, torch.device("cpu"), torch.float64).how["non_blocking"]
