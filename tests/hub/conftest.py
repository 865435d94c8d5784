"""What the tests of the Hub share: a Hub on loopback, two clients of it, and models to publish."""

import itertools

import pytest
import torch
from support.hub_client import WITH_THE_PACKAGE, WITHOUT_THE_PACKAGE, Client
from support.hub_server import HubServer

from hydravit_hf.image_processing import make_image_processor

SEEDS = itertools.count()  # new weights for each model: the Hub takes no file twice


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_user": "user", "hf_other": "other"}) as server:
        yield server


@pytest.fixture(scope="module")
def user(hub, tmp_path_factory):
    """Has the package and a token."""
    with Client(hub, tmp_path_factory.mktemp("user"), WITH_THE_PACKAGE, "hf_user") as client:
        yield client


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """Has neither."""
    with Client(hub, tmp_path_factory.mktemp("reader"), WITHOUT_THE_PACKAGE) as client:
        yield client


@pytest.fixture
def save(make_model, tmp_path):
    """Saves a new tiny model and its processor into a folder, and gives both."""

    def save_new(name: str = "saved", heads: int = 6, **kwargs):
        torch.manual_seed(next(SEEDS))
        model = make_model(num_attention_heads=heads, subnetwork_heads=list(range(1, heads + 1)))
        folder = tmp_path / name
        model.save_pretrained(folder, **kwargs)
        make_image_processor(model.config).save_pretrained(folder)
        return folder, model

    return save_new
