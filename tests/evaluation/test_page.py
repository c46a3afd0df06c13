from crocodil.evaluation.page import GLOSSARY, introduce, mark_differences, plain_settings


def test_differing_tokens_are_marked() -> None:
    source, output = mark_differences("if a < low:", "if a < high + 1:")
    assert source == "if a &lt; <mark>low</mark>:"
    assert output == "if a &lt; <mark>high + 1</mark>:"


def test_nested_settings_are_said_with_their_units() -> None:
    settings = {
        "parameters": {"base": 812_345, "encoder": 1_240_000, "head": 4096},
        "minutes": {"base": 2.71, "latent prior": 0.04},
        "training_steps": {"base": 800, "judge": [1, 2.5]},
        "sigma": 0.75,
    }
    assert plain_settings(settings) == {
        "parameters": "base 0.8 M, encoder 1.2 M, head 4,096",
        "minutes": "base 2.7, latent prior 0.0",
        "training steps": "base 800, judge 1, 2.5",
        "sigma": "0.75",
    }
    assert "took 2.8 minutes (base 2.7, latent prior 0.0)" in introduce(settings | {"corpus": "functions"}, {}, 64)[1]


def test_entropy_is_told_as_it_is_measured() -> None:
    meaning = {header: meaning for header, meaning, _ in GLOSSARY}["Entropy"]
    assert "of the tokens within a text (through its first end token), averaged over texts, in nats" in meaning
