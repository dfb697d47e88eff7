"""A finished run's folder and its page."""

import pytest
from report_samples import make_run

from lcp_plugin.report import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("output") / "mine")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text("utf-8")
