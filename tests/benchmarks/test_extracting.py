"""The row of mean differences: what is timed is what is found by hand, and every cell has its numbers."""

import pytest
import torch

from benchmarks.peers import actsteer, by_hand, extracting, language


@pytest.mark.slow
@pytest.mark.parametrize("peer", [by_hand, actsteer])
def test_every_cell_has_its_numbers(peer):
    cells = extracting.row(peer, repeats=2, quick=True)
    assert list(cells) == ["block 5 of 10", "block 5 of 10, MB", "all 10 blocks", "all 10 blocks, MB"]
    for name, cell in cells.items():
        if name.endswith("MB"):
            assert cell.numbers["megabytes"] >= 0
        else:
            assert "cosine to by hand's 1.000000 or more" in cell.evidence
            assert [len(seconds) for seconds in cell.numbers["seconds"].values()] == [2, 2]


def test_by_hand_is_the_difference_of_the_last_tokens_one_text_at_a_time():
    model, tokenizer = language.tiny(), language.tiny_tokenizer()
    positive, negative = extracting.texts(8)
    sites = ["model.layers.2", "model.layers.9"]
    with torch.no_grad():
        found = by_hand.extract(model, tokenizer, positive, negative, sites)
        for index, site in enumerate(sites):
            means = []
            for texts in (positive, negative):
                kept = []
                hook = lambda module, args, output, kept=kept: kept.append(output[0, -1].double())  # noqa: E731
                handle = model.get_submodule(site).register_forward_hook(hook)
                for text in texts:
                    model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
                handle.remove()
                means.append(torch.stack(kept).mean(dim=0))
            torch.testing.assert_close(found[site], means[0] - means[1], rtol=1e-4, atol=1e-5)
            assert index or means[0].sub(means[1]).norm() > 0


def test_the_texts_are_as_many_as_asked_for_and_pairs_begin_alike():
    for pairs in (4, 8, 256):
        positive, negative = extracting.texts(pairs)
        assert len(positive) == len(negative) == len(set(positive)) == len(set(negative)) == pairs
        assert all(a.split()[0] == b.split()[0] and a != b for a, b in zip(positive, negative, strict=True))


def test_what_is_compared_tells_direction_and_length():
    wanted = {"0": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    assert "1.000000 or more, length 2 to 2 of its" in extracting.compared({"0": torch.tensor([6.0, 8.0])}, wanted)
    assert "0.000000 or more" in extracting.compared({"0": torch.tensor([4.0, -3.0])}, wanted)
