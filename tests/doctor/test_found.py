"""The one finding that checks of codes make of several layers."""

from types import SimpleNamespace
from typing import Any

from llmq.doctor.codes import _found
from llmq.doctor.findings import WARNING, Finding


def test_a_finding_names_all_layers_and_the_number_of_the_first() -> None:
    layers: Any = [(SimpleNamespace(module="a"), 1), (SimpleNamespace(module="b"), 2)]
    found = list(_found("groups-dead", WARNING, layers, "saw {}".format, "do this"))
    assert found == [Finding("groups-dead", WARNING, ("a", "b"), "saw 1", "do this")]
    assert list(_found("groups-dead", WARNING, [], str, "do this")) == []
