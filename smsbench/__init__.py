"""Does a medical vision-language model look at the image, or does it repeat the report?

The names below are the whole public interface; each is imported when it is first asked for. Every
other module is internal and may change without notice.
"""

__version__ = "0.1.0"

_DOOR = {  # name -> module below smsbench that holds it, in the order of a study
    'InputError': 'core',
    'phantom_cohort': 'data.phantom',
    'save_phantom': 'data.phantom',
    'read_manifest': 'data.cards',
    'build_cohort': 'data.cohort',
    'write_cohort': 'data.cohort',
    'read_cohort': 'data.cohort',
    'open_cohort': 'data.sealed_cohort',
    'make_splits': 'data.splits',
    'apply_splits': 'data.splits',
    'audit_files': 'data.audit',
    'read_answer': 'answers.reader',
    'Arm': 'audit.arms',
    'ARMS': 'audit.arms',
    'make_plan': 'audit.plan',
    'attainable': 'audit.plan',
    'AuditSettings': 'audit.settings',
    'register': 'audit.registration',
    'planted': 'testing.planted',
    'Source': 'audit.runner',
    'score_trials': 'audit.runner',
    'prove_delivery': 'audit.delivery',
    'Bootstrap': 'resampling',
    'measure': 'audit.metrics',
    'give_verdicts': 'audit.verdicts',
    'export_trials': 'audit.exchange',
    'Run': 'core',
    'import_predictions': 'audit.exchange',
    'run_audit': 'audit.run',
    'load_results': 'audit.run',
    'write_report': 'report.html',
    'load_model': 'vlm.model',
    'AttendSettings': 'attention.run',
    'attend': 'attention.run',
    'load_attention': 'attention.run',
    'reanalyse': 'published.reanalysis',
    'load_clip': 'clip.model',
    'Clip': 'clip.model',
    'images_of': 'clip.dataset',
    'TrainSettings': 'clip.config',
    'train': 'clip.trainer',
    'evaluate': 'clip.evaluate',
    'retrieve': 'clip.retrieval',
    'explain': 'clip.explain',
}
__all__ = list(_DOOR)


def __getattr__(name):
    if name not in _DOOR:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    return getattr(import_module(f'smsbench.{_DOOR[name]}'), name)


def __dir__():
    return sorted({*globals(), *_DOOR})


from smsbench.aliases import accept_old_names

accept_old_names()
