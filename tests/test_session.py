"""Which cluster is joined, and what is said of one that is not."""

from __future__ import annotations

import pytest

from eat_dist.cluster.session import connect
from eat_dist.config import ClusterConfig
from eat_dist.errors import ClusterError

CLIENT = "ray://10.0.0.1:10001"


@pytest.mark.parametrize("named_by", ["cluster.address", "RAY_ADDRESS"])
def test_an_address_of_ray_client_is_refused_with_what_to_do_instead(
    named_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named_by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", CLIENT)

    with pytest.raises(ClusterError, match=r"run the command on the cluster's head .*, or send it there") as refused:
        connect(ClusterConfig(address=CLIENT if named_by == "cluster.address" else None))

    assert CLIENT in str(refused.value)
    assert "\n" not in str(refused.value)
