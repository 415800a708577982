import pytest
from vcore_train.probe_sampler import ProbeSampler


@pytest.mark.parametrize("replacement", [True, False])
def test_probe_sampler_resumes(replacement):
    sampler = ProbeSampler(10, replacement=replacement, seed=3)
    drawn = [sampler.draw(4) for _ in range(3)]
    state = sampler.state()
    after = [sampler.draw(4) for _ in range(5)]
    other = ProbeSampler(10, replacement=replacement, seed=99)
    other.load_state(state)
    assert [other.draw(4) for _ in range(5)] == after
    if not replacement:
        assert sorted([number for batch in [*drawn, *after] for number in batch][:10]) == list(
            range(10)
        )


def test_a_sampler_of_another_dataset_does_not_resume():
    state = ProbeSampler(10, replacement=False, seed=3).state()
    with pytest.raises(ValueError, match=r"from 10 examples, and the training set has 8"):
        ProbeSampler(8, replacement=False, seed=3).load_state(state)
