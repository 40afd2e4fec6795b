"""What an exception says of credentialed data is told to nobody but the owner."""

import json

import pandas as pd, pytest

from tests.test_credentialed import CARD, lent, secrets  # noqa: F401 (a fixture)


class Talks:
    "A planted model whose failures and answers repeat what it was shown."

    def __init__(self, model):
        self.inner, self.name, self.info, self.asked = model, model.name, model.info, 0

    def score(self, batch):
        from dataclasses import replace

        self.asked += 1
        if any(len(x.prompt) % 11 == 0 for x in batch):
            raise ValueError(f'cannot answer {batch[0].prompt!r}\nSECRET\x1b[31m')
        return [replace(a, raw_text=x.prompt) for a, x in zip(self.inner.score(batch), batch)]


@pytest.fixture
def talking(monkeypatch):
    "Every planted model talks."
    import smsbench.audit.run as run, smsbench.audit.settings as settings

    quiet = settings.open_model
    for module in (run, settings):
        monkeypatch.setattr(module, 'open_model', lambda *a, **k: Talks(quiet(*a, **k)))
    build = settings.AuditSettings.__init__
    monkeypatch.setattr(
        settings.AuditSettings,
        '__init__',
        lambda self, **k: build(self, **{'max_failures': 1.0, **k}),
    )


def audit(here, lent, *more):  # noqa: F811
    return here(
        *('audit', '--manifest', lent / 'asked.yaml', '--root', lent, '--n-boot', '100'),
        *('--model', 'planted:image-only', '--arms', 'image_swap,text_swap', '--out', 'run', *more),
    )


def test_words_of_failed_trials_stay_home(lent, here, talking, tmp_path):  # noqa: F811
    (lent / 'asked.yaml').write_text(CARD)
    code, *printed = audit(here, lent, '--private', tmp_path.parent / f'{tmp_path.name}-own')
    assert code == 0, printed
    tables = [pd.read_parquet(p) for p in (tmp_path / 'run/predictions').glob('*.parquet')]
    failed = pd.concat(tables).query('parse_status == "error"')
    assert len(failed) > 5 and failed.error.str.contains('withheld').all()
    assert secrets(tmp_path, printed) == []
    own = tmp_path.parent / f'{tmp_path.name}-own'
    kept = {p.name for p in own.iterdir()}
    assert {'README.txt', 'messages.jsonl', 'ids.csv', 'exclusions.csv', 'examples.html'} <= kept
    assert own.stat().st_mode & 0o77 == 0 and str(own) in ''.join(printed)
    words = [json.loads(line) for line in (own / 'messages.jsonl').read_text().splitlines()]
    assert any('SECRETname' in w['words'] and w.get('trial_id') for w in words)
    ids = pd.read_csv(own / 'ids.csv', dtype=str)
    assert ids.own_sample_id.str.startswith('SECRETsample').all()
    plan = pd.read_parquet(tmp_path / 'run/plan.parquet')
    assert set(plan.sample_id) <= set(ids.sample_id)
    left_out = pd.read_csv(own / 'exclusions.csv', dtype=str)
    assert left_out.detail.str.contains('SECRETlabel').any()
    assert left_out.detail.str.contains('SECRETlost').any()


def test_a_folder_inside_the_run_is_refused(lent, here, tmp_path):  # noqa: F811
    (lent / 'asked.yaml').write_text(CARD)
    code, _, err = audit(here, lent, '--private', 'run/own')
    assert code == 2 and 'beside' in err and not (tmp_path / 'run').exists()


def test_a_refused_cohort_shows_its_owner_what_was_at_fault(lent, here, tmp_path):  # noqa: F811
    (lent / 'asked.yaml').write_text(CARD.replace('max_excluded: 0.3', 'max_excluded: 0.001'))
    own = tmp_path.parent / f'{tmp_path.name}-own'
    code, *printed = here(
        *('cohort', lent / 'asked.yaml', '--root', lent, '--out', 'c.parquet', '--private', own)
    )
    assert code == 2 and 'SECRET' not in ''.join(printed) and 'max_excluded' in printed[1]
    assert 'SECRETlabel' in (own / 'exclusions.csv').read_text()
