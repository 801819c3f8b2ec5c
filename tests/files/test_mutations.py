"""Some damaged and hostile files; `mutations.py` takes as many as one likes."""

import mutations
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_a_mutated_file_does_no_harm(ending, tmp_path):
    outcomes, harms = mutations.run(mutations.base_file(tmp_path, ending), 60)
    assert harms == []
    assert any(": refused" in outcome for outcome in outcomes)
    assert any(": loaded" in outcome for outcome in outcomes)
    assert outcomes.total() == 60
