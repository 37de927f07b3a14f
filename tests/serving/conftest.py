"""Two models of random weights, and an endpoint that serves them."""

import pytest
from conftest import add_imported
from local_endpoint import new_service, random_generator, served


@pytest.fixture(scope="session")
def grey(storage):
    """Model `grey@best`, of one version."""
    G = random_generator(0)
    add_imported("grey", G)
    return G


@pytest.fixture(scope="session")
def colour(storage):
    """Model `colour@best`."""
    G = random_generator(1, channels=3)
    add_imported("colour", G)
    return G


@pytest.fixture(scope="session")
def service(grey, colour):
    """Serves both, `grey` by default."""
    return new_service(["grey", "colour@best"])


@pytest.fixture(scope="session")
def endpoint(service):
    """Its address; everybody is let in."""
    with served(service) as url:
        yield url
