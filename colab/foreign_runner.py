"""Answer the trials of smsbench with a model that smsbench cannot load.

python foreign_runner.py trials.jsonl answers.jsonl

Write the trials with `smsbench trials`, replace `answer`, run this where your model is, and give
the answers to `smsbench predictions`.
"""

import hashlib, json, sys
from pathlib import Path

from PIL import Image, ImageStat


def answer(image, prompt, choices):
    "Your model; image is a PIL image or None. This one gives bright images the first choice."
    return choices[0] if image and ImageStat.Stat(image.convert('L')).mean[0] > 142 else choices[1]


def sha(*parts):
    return hashlib.blake2b(b'|'.join(parts), digest_size=8).hexdigest()


trials = Path(sys.argv[1])
with open(sys.argv[2], 'w', encoding='utf-8') as out:
    for t in map(json.loads, trials.read_text(encoding='utf-8').splitlines()):
        image = Image.open(trials.parent / t['image']).convert('RGB') if t['image'] else None
        seen, said = (
            image.tobytes() if image else b'',
            t['prompt'].encode(),
        )  # hash what your model was really given: it proves the delivery
        print(
            json.dumps(
                dict(
                    trial_id=t['trial_id'],
                    raw_text=answer(image, t['prompt'], t['choices']),
                    pixel_sha=sha(seen) if image else '',
                    token_sha=sha(said),
                    delivered_sha=sha(seen, said),
                )
            ),
            file=out,
        )
