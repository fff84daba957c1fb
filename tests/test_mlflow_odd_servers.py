"""What is no MLflow server, but answers all the same, is named in one warning."""

from __future__ import annotations

import pytest

from eat_dist.config import parse_config
from eat_dist.tracking import Tracker
from mlflow_server import clean_environment, stand_in, warnings_of

NO_MLFLOW = {
    "a web server": ((404, "text/html", b"<html>no</html>"), "no MLflow server (it answers /version with HTTP 404"),
    "a web page": ((200, "text/html", b"<html>hello</html>"), "no MLflow server (it answers /version with HTTP 200"),
    "a gate": ((401, "text/plain", b"who are you?"), "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME"),
}


def start(uri: str) -> Tracker:
    config = parse_config({"tracking": {"uri": uri}})
    return Tracker.start(config, run_name="a run", tags={}, resume_run_id="0" * 32, wait=60)


@pytest.mark.parametrize("case", NO_MLFLOW)
def test_what_is_no_mlflow_server_is_named_in_one_warning(case: str, caplog: pytest.LogCaptureFixture) -> None:
    answer, expected = NO_MLFLOW[case]
    with clean_environment(), stand_in(lambda _: answer) as uri:
        tracker = start(uri)
        tracker.log_metrics({"loss": 1.0}, 1)
        assert not tracker.close("FINISHED")
    [warning] = warnings_of(caplog)
    assert expected in warning
    assert uri in warning
    assert tracker.missing == 3
