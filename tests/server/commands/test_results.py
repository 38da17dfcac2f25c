"""What is printed of an export and a report."""

from tests.support.command_line import invoke


def test_export_and_report_print_where(tmp_path, monkeypatch):
    """Catches: a path that a script cannot read."""
    monkeypatch.setattr("tsugiki.server.export.export.export", lambda folder, *_, **__: folder / "adapter")
    monkeypatch.setattr("tsugiki.server.report.page.write_report", lambda folder: folder / "report.html")
    assert invoke("export", tmp_path).stdout == f"{tmp_path / 'adapter'}\n"
    assert invoke("report", tmp_path).stdout == f"{tmp_path / 'report.html'}\n"
