"""A report is written as strict JSON with every number, and as one line."""

import json
import subprocess
import sys

import pytest

from klora.report.picture import draw
from test_folder.report.reporting import made, names, partly_shared, reported, strictly


def test_json_goes_there_and_back():
    report = reported(*partly_shared(), pattern="s*", steps=9, alphas={"content": {8.0: 37}})
    told = strictly(json.dumps(report.to_json(), allow_nan=False))
    assert [[letter == "c" for letter in step] for step in told["wins"]] == report.content_wins.tolist()
    assert list(told["ratio"]) == list(report.layers)
    infinite = [name for name, R in told["ratio"].items() if R is None]
    assert infinite == told["content_only"] == names()[-2:] and told["style_only"] == names()[:3]
    assert all(R == S for R, S in zip(told["ratio"].values(), report.ratio.tolist(), strict=True) if R is not None)
    assert told["layers"] == {"shared": 35, "content_only": 2, "style_only": 3}
    assert told["slider"] == {f"{bias:g}": share for bias, share in report.slider.items()}
    assert (told["alphas"], told["ranks"]["style"]) == ({"content": {"8": 37}}, {"5": 38})
    for name in ("order", "steps", "style_bias", "gamma", "gammas", "style_share", "balance", "always"):
        assert told[name] == getattr(report, name)
    assert (told["pattern"], told["alpha"], told["beta"]) == ("s*", 1.5, 1.275)
    assert list(told["ratio_quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert told["thresholds"] == report.thresholds.tolist()
    assert told["style_share_by_step"] == report.style_share_by_step


def test_lines_say_where_the_slider_gives_each_a_half():
    report, alike = reported(*partly_shared(), steps=9), reported(*partly_shared()[:1] * 2, steps=1)
    assert f"; about a half at {report.balance:g}" in str(report)
    assert "; a half at none up to 10" in str(alike)


@pytest.mark.parametrize("roles", [(0, 0), (0, 1), (1, 0)])
def test_json_is_strict_also_of_loras_without_layers(roles):
    content, style = (made(names()) if there else {} for there in roles)
    report = reported(content, style)
    told = strictly(json.dumps(report.to_json(), allow_nan=False))
    assert told["ratio_quantiles"] == {}
    assert (told["style_share"] is None) is (roles == (0, 0)) is ("style acts in no layer;" in report.summary())
    assert draw(report) and "\n" not in report.summary()


def test_the_summary_is_one_line_with_the_numbers():
    report = reported(*partly_shared(), pattern="s", steps=9, style_bias=0.8)
    line = report.summary()
    assert line.startswith(
        "klora s alpha 1.5 beta 0.5 style_bias 0.8 steps 9: 35 layers shared, 2 content's, 3 style's;"
    )
    assert f"gamma {report.gamma:.3g}" in line and f"style acts in {report.style_share:.0%}" in line
    assert "\n" not in line and len(line) < 400


# Ctrl-C, or a cancellation, while the first report of a process loads what it is drawn with; then another report.
INTERRUPTED = """
import importlib.abc, pathlib, signal, sys
from klora.report.pair import save_report
from test_folder.report.reporting import healthy

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "matplotlib.rcsetup":  # when others of it have come, which keep what it was till then
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

report, folder = healthy(), pathlib.Path(sys.argv[1])
assert "matplotlib" not in sys.modules
sys.meta_path.insert(0, Interrupting())
try:
    save_report(report, folder)
except KeyboardInterrupt:
    print(*save_report(report, folder))
"""


def test_a_report_whose_libraries_were_loading_when_it_was_interrupted_is_drawn_the_next_time(tmp_path):
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == (f"{tmp_path}/report.png {tmp_path}/report.json\n", 0), ran.stderr
