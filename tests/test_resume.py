"A run that is killed at any moment ends, started again, with the same table."
import multiprocessing, os, random, signal, time

import pytest

from smsbench.core import Run, read_table, table_hash
from smsbench.data.phantom import phantom_cohort
from smsbench.sms.audit import Source, read_predictions, score_plan
from smsbench.sms.shifts import make_plan


class Slow:
    "A planted model that takes its time, so that a kill can hit it while it works."
    def __init__(self, pause):
        from smsbench.vlm.planted import planted
        self.inner, self.pause = planted('planted:mixture:0.6'), pause
        self.name, self.info = self.inner.name, self.inner.info
    def score(self, batch):
        time.sleep(self.pause)
        return self.inner.score(batch)


def work(folder, pause=.004):
    cohort = phantom_cohort(30, size=64, seed=3)
    plan = read_table(f'{folder}/plan.parquet', 'plan')
    score_plan(plan, Source(cohort), Slow(pause), Run(folder), batch_size=4, part_size=16)


@pytest.fixture(scope='module')
def plan(tmp_path_factory):
    return make_plan(phantom_cohort(30, size=64, seed=3), ['image_swap', 'text_swap'])[0]


def start(folder, plan):
    from smsbench.core import write_table
    if not (folder/'plan.parquet').exists(): write_table(plan, folder/'plan.parquet', 'plan')
    server = multiprocessing.get_context('forkserver')     # a clean process that has the imports: a child starts in milliseconds
    server.set_forkserver_preload(['tests.test_resume', 'pandera.pandas', 'pyarrow.parquet', 'smsbench.vlm.planted'])
    p = server.Process(target=work, args=(str(folder),))
    p.start()
    return p


def content(folder): return table_hash(read_predictions(Run(folder)).drop(columns='seconds'))


def test_twenty_kills(tmp_path, plan):
    whole, often = tmp_path/'whole', tmp_path/'often'
    whole.mkdir(); often.mkdir()
    p = start(whole, plan); p.join(); assert p.exitcode == 0          # also warms the fork server up
    begin = time.time(); second = tmp_path/'second'; second.mkdir(); p = start(second, plan); p.join(); duration = time.time() - begin
    rng, hits, found = random.Random(7), 0, []
    while hits < 20:
        p = start(often, plan)
        p.join(rng.uniform(.05, .6) * duration)
        assert p.exitcode in (None, 0)
        if p.is_alive(): os.kill(p.pid, signal.SIGKILL); hits += 1
        p.join()
        parts = sorted((often/'predictions').glob('part-*.parquet')) if (often/'predictions').exists() else []
        found.append(len(parts))
        for f in parts: read_table(f, 'predictions')                   # what is there is whole
        if p.exitcode == 0 or len(parts) == len(list((whole/'predictions').glob('part-*'))):
            for f in parts[1::2]: f.unlink()                          # finished before the twentieth kill: take half of it away
    p = start(often, plan); p.join()
    assert p.exitcode == 0 and content(often) == content(whole) == content(second)
    assert len(set(found)) > 3, f'the kills hit the same place every time: {found}'
    assert not list((often/'predictions').glob('part-*.tmp'))


def test_the_comparison_can_fail(tmp_path, plan):
    a = tmp_path/'a'; a.mkdir(); p = start(a, plan); p.join()
    full = content(a)
    next(iter((a/'predictions').glob('part-*.parquet'))).unlink()
    assert content(a) != full
