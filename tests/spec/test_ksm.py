"""What the model of KSM predicts, in cases that a reader can follow."""

from vapama.spec.ksm import Counters, Ksm, Options, scans_to_skip


def merged(pages: int, options: Options | None = None) -> Ksm:
    """A process of so many pages of one content, scanned twice."""
    model = Ksm(pages, options)
    model.advise(0, 0, pages, 1)
    for page in range(pages):
        model.write(0, page, 7)
    model.scan()
    assert model.counters() == Counters(0, 0, 0, pages, 0, 0)
    model.scan()
    return model


def test_equal_pages_merge_at_the_second_scan() -> None:
    model = merged(3)
    assert model.partition() == [0, 0, 0]
    assert model.counters() == Counters(1, 2, 0, 0, 0, 0)


def test_a_write_copies_even_the_last_page_of_a_merged_frame() -> None:
    model = merged(2)
    model.write(0, 0, 8)
    model.write(0, 1, 7)
    assert model.partition() == [0, 1]
    assert model.counters() == Counters(1, 1, 0, 0, 0, 0), "counters wait for the next scan"
    model.scan()
    assert model.counters() == Counters(0, 0, 1, 1, 0, 0)


def test_no_more_than_max_page_sharing_pages_share_a_frame() -> None:
    for pages, groups in ((4, [4]), (5, [4, 1]), (6, [4, 2]), (9, [4, 4, 1])):
        model = merged(pages, Options(max_page_sharing=4))
        labels = model.partition()
        assert sorted((labels.count(x) for x in set(labels)), reverse=True) == groups


def test_a_fork_may_exceed_it() -> None:
    model = merged(2, Options(max_page_sharing=2))
    model.fork(0)
    model.scan()
    assert model.counters() == Counters(1, 3, 0, 0, 0, 0)


def test_zero_pages_are_mapped_and_counted_apart() -> None:
    model = Ksm(2, Options(use_zero_pages=1))
    model.advise(0, 0, 2, 1)
    model.write(0, 0, 0)
    model.scan()
    model.scan()
    assert model.partition() == [None, None]
    assert model.counters().zero == 1
    model.write(0, 0, 1)
    assert model.counters().zero == 0


def test_smart_scan_leaves_pages_out_longer_and_longer() -> None:
    assert [scans_to_skip(age) for age in (3, 4, 5, 6, 8, 9, 255)] == [1, 2, 2, 4, 4, 8, 8]
    model = Ksm(1, Options(smart_scan=1))
    model.advise(0, 0, 1, 1)
    model.write(0, 0, 1)
    skipped = []
    for _ in range(10):
        model.scan()
        skipped.append(model.skipped)
    assert skipped == [0, 0, 0, 0, 1, 1, 2, 3, 3, 4]
