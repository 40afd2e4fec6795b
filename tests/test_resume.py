"A run that is killed at any moment ends, started again, with the same table."

import multiprocessing, os, random, signal, time

import pytest

from smsbench.core import Run, table_hash
from smsbench.data.phantom import phantom_cohort
from smsbench.audit.runner import Source, read_predictions, score_plan
from smsbench.audit.plan import make_plan
from smsbench.privacy import read_table


class Slow:
    "A planted model that takes its time, so that a kill can hit it while it works."

    def __init__(self, pause):
        from smsbench.testing.planted import planted

        self.inner, self.pause = planted('planted:mixture:0.6'), pause
        self.name, self.info = self.inner.name, self.inner.info

    def score(self, batch):
        time.sleep(self.pause)
        return self.inner.score(batch)


def work(folder, ready, pause=0.004):
    cohort, model = phantom_cohort(30, size=64, seed=3), Slow(pause)
    plan = read_table(f'{folder}/plan.parquet', 'plan')
    ready.set()  # from here on a kill hits the work itself
    score_plan(plan, Source(cohort), model, run=Run(folder), batch_size=4, part_size=8)


@pytest.fixture(scope='module')
def plan(tmp_path_factory):
    return make_plan(phantom_cohort(30, size=64, seed=3), ['image_swap', 'text_swap'])[0]


def start(folder, plan):
    "A process that works on the plan; returns once it has begun to score."
    from smsbench.privacy import write_table

    folder.mkdir(exist_ok=True)
    if not (folder / 'plan.parquet').exists():
        write_table(plan, folder / 'plan.parquet', 'plan')
    server = multiprocessing.get_context(
        'forkserver'
    )  # a clean process that has the imports: a child starts in milliseconds
    server.set_forkserver_preload(
        ['tests.test_resume', 'pandera.pandas', 'pyarrow.parquet', 'smsbench.testing.planted']
    )
    ready = server.Event()
    p = server.Process(target=work, args=(str(folder), ready))
    p.start()
    assert ready.wait(60)
    return p


def parts(folder):
    return sorted((folder / 'predictions').glob('part-*.parquet'))


def content(folder):
    return table_hash(read_predictions(Run(folder)).drop(columns='seconds'))


def test_twenty_kills(tmp_path, plan):
    whole, often = tmp_path / 'whole', tmp_path / 'often'
    p = start(whole, plan)
    begin = time.time()
    p.join()
    duration = time.time() - begin
    assert p.exitcode == 0
    rng, kills, progress = random.Random(7), 0, set()
    while kills < 20:
        p = start(often, plan)
        p.join(rng.uniform(0.1, 0.8) * duration)
        assert p.exitcode in (None, 0)
        if p.exitcode is None:
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        for f in parts(often):
            read_table(f, 'predictions')  # what is there is whole
        progress.add(len(parts(often)))
        if len(parts(often)) == len(
            parts(whole)
        ):  # finished before the twentieth kill: take half of it away
            for f in parts(often)[1::2]:
                f.unlink()
    p = start(often, plan)
    p.join()
    assert p.exitcode == 0 and content(often) == content(whole)
    assert len(progress) > 3, f'the kills hit the same few places: {progress}'


def test_the_comparison_can_fail(tmp_path, plan):
    p = start(tmp_path / 'a', plan)
    p.join()
    full = content(tmp_path / 'a')
    parts(tmp_path / 'a')[0].unlink()
    assert content(tmp_path / 'a') != full
