"""Prices are the user's own, in one file; a wrong one is one clear line."""

from pathlib import Path

import pytest

from orpo_ray.errors import ConfigError
from orpo_ray.planner.cost import Prices, read_prices
from orpo_ray.planner.interval import Interval


def written(folder: Path, text: str) -> Path:
    (folder / "prices.yaml").write_text(text, encoding="utf-8")
    return folder / "prices.yaml"


def test_prices_are_by_gpu_and_hour(tmp_path):
    prices = read_prices(written(tmp_path, "currency: EUR\ngpus: {rtx4090: 0.45, L4: 1}\n"))
    assert prices == Prices("EUR", {"rtx4090": 0.45, "l4": 1.0})
    cost = prices.of("rtx4090", 2, Interval(1.0, 2.0, 4.0))
    assert cost is not None
    assert cost.to_json() == pytest.approx([0.9, 1.8, 3.6])
    assert prices.of("t4", 2, Interval(1.0, 2.0, 4.0)) is None


def test_a_currency_may_be_left_out(tmp_path):
    assert read_prices(written(tmp_path, "gpus: {t4: 0}")).currency == ""


@pytest.mark.parametrize("text", ["{h100: 2, h100-sxm: 3}", "{h100-sxm: 3, h100: 2}"])
def test_a_family_has_one_price_and_a_member_may_have_its_own(tmp_path, text):
    prices = read_prices(written(tmp_path, f"gpus: {text}"))
    assert prices.gpus == {"h100-pcie": 2.0, "h100-sxm": 3.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prices; write `currency: EUR`"),
        ("rtx4090: 0.45", "has no prices"),
        ("gpus:", "has no prices"),
        ("gpus: {}", "has no prices"),
        ("gpus: [rtx4090]", "has no prices"),
        ("gpus: {rtx4090: 1", "cannot be read: "),
        ("gpus: {rtx4090: cheap}", "gpus.rtx4090: must be a number of 0 or more, not 'cheap'"),
        ("gpus: {rtx4090: true}", "must be a number of 0 or more, not True"),
        ("gpus: {rtx4090: -1}", "must be a number of 0 or more, not -1"),
        ("gpus: {rtx4090: .nan}", "must be a number of 0 or more, not nan"),
        ("gpus: {rtx4090: .inf}", "must be a number of 0 or more, not inf"),
        ("gpus: {l4: 0.5, L4: 0.9}", "gpus.l4 and gpus.L4 are the same GPU"),
        ("gpus: {l4: 1, l4: 2}", "l4 stands twice"),
        ("gpus: {rtx4090: }", "must be a number of 0 or more, not None"),
        ("gpus: {rtx409: 1}", "gpus.rtx409: no GPU 'rtx409'; did you mean rtx4090?"),
        ("gpus: {4090: 1}", "gpus.4090: no GPU '4090'"),
        ("gpus: {t4: 1}\ncurency: EUR", "curency is unknown; did you mean currency?"),
        ("gpus: {t4: 1}\n7: EUR", "7 is unknown; write `currency: EUR`"),
        ("gpus: {t4: 1}\ncurrency: 5", "currency must be a word such as EUR, not 5"),
        ("gpus: {t4: 1}\ncurrency: no", "currency must be a word such as EUR, not False"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_prices(path)
    message = str(caught.value)
    assert message.startswith(f"--prices: {path}") and said in message and "\n" not in message
    assert "--gpu" not in message


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(ConfigError, match=r"--prices: .* cannot be read: "):
            read_prices(path)
