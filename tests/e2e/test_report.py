"""The report of a real run: a plain --save-dir of fairseq and its --log-file, without a launcher."""

from pathlib import Path

from fairseq_moe.report.command import main
from tests.e2e.commands import json_lines, train
from tests.helpers.reports import parsed


def test_save_directory_and_log_file_of_fairseq_make_a_page(text_data: Path, tmp_path: Path) -> None:
    save_dir = tmp_path / "save"
    save_dir.mkdir()  # stock opens the log before it makes the directory
    result = train(text_data, save_dir, "--log-file", save_dir / "log.txt", "--clip-norm", 1)
    (tmp_path / "output.txt").write_text(result.output)
    assert main([str(save_dir)]) == 0
    page = parsed(save_dir / "report.html")
    last, [valid] = json_lines(result, "train_inner")[-1], json_lines(result, "valid")
    top = "".join(page.text[""].split())
    assert "stateended" in top and "updates4" in top
    assert f"trainingloss,bits{last['inner_loss']}" in top
    assert f"validloss,bits{valid['valid_inner_loss']}" in top
    assert f"{float(last['gnorm']):.4g} at update 4" in page.text["gradient-norm"]
    assert "moe_gate_loss: " in page.text["gate-losses"]
    assert "There are 4 experts, over all layers." in page.text["dead-experts"]
    assert "cannot be read" not in page.text[""]
    assert len(page.all("svg")) == 7
    assert "Not known" in page.text["skipped-updates"]
    logs = ["--log", str(save_dir / "log.txt"), "--log", str(tmp_path / "output.txt")]
    assert main([str(save_dir), *logs]) == 0
    assert "None." in parsed(save_dir / "report.html").text["skipped-updates"]
