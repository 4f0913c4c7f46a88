"""Shared by all tests."""

import pytest
import torch

from ranks import close_pools

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _pools_end_with_the_session():
    yield
    close_pools()
