"""What is refused: nodes and jobs without the token, and whoever would see the dashboard."""

import pytest
from cluster.on_prem import RAY


@pytest.fixture(scope="module")
def stranger(network, on_prem):
    """A host on the cluster's network that knows no token."""
    host = network.host("stranger")
    yield host
    host.kill()


def test_a_node_without_the_token_is_refused(on_prem, stranger):
    join = f"timeout 60 {RAY} start --address={on_prem.head.address}:6379 --num-cpus=1"
    for mode in "disabled", "token":
        stranger.run(f"mkdir -p ~/.ray; echo {64 * '0'} > ~/.ray/auth_token")
        joined = stranger.run(f"RAY_AUTH_MODE={mode} {join}", check=False)
        assert joined.returncode != 0, joined.stdout
        assert stranger.address not in on_prem.alive().values()


def test_a_job_without_the_token_is_refused(on_prem, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text(64 * "0")
    for stranger in {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(wrong)}:
        said = on_prem.submit("-c print('ran')", status=1, **stranger)
        assert "401" in said or "403" in said or "token" in said.lower()
        assert "ran\n" not in said


def test_the_dashboard_answers_on_loopback_alone(on_prem, stranger):
    def opens(port, host):
        return host.run(f"timeout 5 bash -c '< /dev/tcp/{on_prem.head.address}/{port}'", False)

    assert opens(6379, stranger).returncode == 0  # Ray asks for the token there.
    assert opens(8265, stranger).returncode != 0
    assert opens(8265, on_prem.workers[0]).returncode != 0
