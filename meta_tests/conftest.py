"""What every test of the suite runs with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small cases are slower on many threads, and tests run on all cores already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
