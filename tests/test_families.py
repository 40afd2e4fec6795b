"""Every family of vision-language models, from a folder through the public loader.

The prompt, the delivery and the answer are checked.
"""

import json, logging

import numpy as np, pytest, torch, transformers as tf
from PIL import Image

from smsbench.core import InputError
from smsbench.vlm.checkpoints import describe_checkpoint
from smsbench.vlm.families import FAMILIES, PLAIN
from smsbench.vlm.model import Inputs, extended, load_model
from smsbench.vlm.prompting import control_tokens
from smsbench.testing.tiny import TINY, tiny_checkpoint, tiny_tokenizer

tf.logging.set_verbosity_error()
tf.logging.disable_progress_bar()
logging.getLogger('transformers').setLevel(logging.ERROR)
FILM, OTHER = np.random.default_rng(0).integers(0, 256, (2, 90, 130), dtype=np.uint8)
TALL = np.random.default_rng(1).integers(0, 256, (150, 60), dtype=np.uint8)
QUESTION, REPORT = (
    'Is there pleural effusion? Answer yes or no.',
    'report: the lungs are clear. Is there pleural effusion?',
)
YN = ('yes', 'no')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp('families'), {}

    def folder(family):
        if family not in made:
            made[family] = tiny_checkpoint(family, root / family)
        return made[family]

    return folder


@pytest.fixture(scope='module')
def vlms(folders):
    loaded = {}

    def vlm(family):
        if family not in loaded:
            loaded[family] = load_model(folders(family), device='cpu')
        return loaded[family]

    return vlm


every_family = pytest.mark.parametrize('family', list(FAMILIES))


def test_every_family_of_the_table_has_a_tiny_checkpoint():
    assert set(TINY) == set(FAMILIES)


# What each family should see, written by hand from its documentation; {} is the question.
IM = '<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n'
BY_HAND = dict(
    llava='USER: {}{} ASSISTANT:',
    llava_next='[INST] {}{} [/INST]',
    llava_onevision=IM,
    qwen2_vl=IM,
    qwen2_5_vl=IM,
    qwen3_vl=IM,
    internvl=IM,
    gemma3='<bos><start_of_turn>user\n{}{}<end_of_turn>\n<start_of_turn>model\n',
    janus='<|User|>: {}{}\n\n<|Assistant|>:',
    mllama=(
        '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}{}<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n'
    ),
    idefics3='<s>User:{}{}<end_of_utterance>\nAssistant:',
    smolvlm='<s>User:{}{}<end_of_utterance>\nAssistant:',
    paligemma='{}answer en {}',
    paligemma2='{}answer en {}',
)
PLACE = dict(
    llava='<image>\n',
    llava_next='<image>\n',
    llava_onevision='<image>\n',
    qwen2_vl='<|vision_start|><|image_pad|><|vision_end|>',
    internvl='<IMG_CONTEXT>\n',
    gemma3='<start_of_image>',
    janus='<image_placeholder>\n',
    mllama='<|image|>',
    idefics3='<image>',
    smolvlm='<image>',
    paligemma='<image>',
    paligemma2='<image>',
)
PLACE |= {q: PLACE['qwen2_vl'] for q in ('qwen2_5_vl', 'qwen3_vl')}


def by_hand(vlm, image, text):
    """Log-probabilities of the next token, by the processor and the model alone.

    None of our code is involved.
    """
    family, p = vlm.caps.family, vlm.processor
    prompt = BY_HAND[family].format(PLACE[family] if image is not None else '', text)
    if image is not None:
        row = p(
            text=[prompt],
            images=[Image.fromarray(image).convert('RGB')],
            return_tensors='pt',
            add_special_tokens=False,
        )
    elif family.startswith('paligemma'):
        ids = p.tokenizer(f'<bos>{prompt}\n', return_tensors='pt', add_special_tokens=False)[
            'input_ids'
        ]
        row = dict(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids)
        )
    else:
        row = p(text=[prompt], return_tensors='pt', add_special_tokens=False)
    row = {k: v for k, v in row.items() if k != 'labels'}
    with torch.inference_mode():
        return vlm.model(**row).logits[0, -1].float().log_softmax(-1)


@every_family
def test_all_that_the_processor_returns_reaches_the_model(family, vlms):
    "Level 0 is the plain forward pass, with image and text, either of them, or neither."
    vlm = vlms(family)
    assert (
        vlm.info['family'] == family
        and vlm.info['route'] == 'loader'
        and sum(p.numel() for p in vlm.model.parameters()) < 1e6
    )
    asked = [
        (FILM, REPORT),
        (TALL, REPORT),
        (FILM, QUESTION),
        (None, REPORT),
        (None, QUESTION),
        (OTHER, REPORT),
    ]
    answers = vlm.score([Inputs(i, t, YN) for i, t in asked])
    for (image, text), a in zip(asked, answers):
        first = by_hand(vlm, image, text)
        for c, lp in zip(YN, a.logprobs):
            ids = [s[0] for s in vlm.spelled(YN)[c]]
            assert np.isclose(lp, float(first[ids].logsumexp(0)), atol=1e-5), (image is None, text)
        assert (
            np.isfinite(a.logprobs).all()
            and 0 < a.answer_mass < 1
            and (a.pixel_sha == '') == (image is None)
        )
    again = vlm.score([Inputs(i, t, YN) for i, t in reversed(asked)])[::-1]
    assert again == answers  # bitwise, in any order
    own, tall, _, text_only, _, swapped = answers
    assert (
        own.delivered_sha != swapped.delivered_sha != text_only.delivered_sha
        and own.pixel_sha != swapped.pixel_sha
    )
    assert own.token_sha == swapped.token_sha == tall.token_sha and len(
        {a.delivered_sha for a in answers}
    ) == len(answers)
    assert np.abs(np.subtract(own.logprobs, swapped.logprobs)).max() > 1e-4  # the image matters
    assert (
        np.abs(np.subtract(own.logprobs, answers[2].logprobs)).max() > 1e-4
    )  # and so does the text


@every_family
def test_spellings_are_listed_and_sequences_are_scored_step_by_step(family, vlms):
    vlm, choices = vlms(family), ('yes', 'no', 'unmatched')
    table = vlm.variants(choices)
    for c in choices:
        assert (
            all(t.strip().lower() == c for t in table.text[table.choice == c])
            and (table.choice == c).any()
        )
    assert {'yes', 'Yes'} <= {t.strip() for t in table.text} and (table.ids.map(len) > 1).any()
    x = Inputs(FILM, QUESTION, choices)
    mass = vlm.variant_mass([x])
    a = vlm.score([x])[0]
    assert np.isclose(mass.mass.sum(), a.answer_mass) and np.allclose(
        mass.groupby('choice').mass.sum()[list(choices)], np.exp(a.logprobs)
    )
    # against generation: what the model's own decoding says about each step
    seq = next(s for s in table.ids[::-1] if len(s) > 1)
    row = vlm.encode(x)[0]
    with torch.inference_mode():
        cached = tf.GenerationMixin.generate(
            vlm.model,
            **row,
            max_new_tokens=len(seq),
            min_new_tokens=len(seq),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            logits_processor=tf.LogitsProcessorList([Forced(seq, row['input_ids'].shape[1])]),
        )
        steps = sum(float(l[0].float().log_softmax(-1)[t]) for l, t in zip(cached.logits, seq))
        assert cached.sequences[0, -len(seq) :].tolist() == list(seq) and np.isclose(
            vlm._sequence(row, seq), steps, atol=2e-4
        )


class Forced(tf.LogitsProcessor):
    "Makes generation write `seq`."

    def __init__(self, seq, start):
        self.seq, self.start = seq, start

    def __call__(self, ids, scores):
        out = torch.full_like(scores, -torch.inf)
        out[:, self.seq[ids.shape[1] - self.start]] = 0
        return out


@every_family
def test_control_tokens_in_a_report_are_refused(family, vlms):
    vlm = vlms(family)
    for token in sorted(control_tokens(vlm.processor))[:5] + [
        vlm.processor.tokenizer.eos_token,
        PLACE[family].strip(),
    ]:
        with pytest.raises(InputError, match='control token|place of the image') as e:
            vlm.score([Inputs(FILM, f'the lungs {token} are clear', YN)])
        assert '\n' not in str(e.value)
    plain = vlm.score([Inputs(FILM, 'a < b > [c] | d / e ## f', YN)])[0]
    assert np.isfinite(plain.logprobs).all()


@pytest.mark.parametrize('family', [f for f in FAMILIES if not f.startswith('paligemma')])
def test_system_prompt_and_extra_sentence_are_said(family, folders, vlms):
    bare = vlms(family)
    vlm = load_model(
        folders(family), device='cpu', system='the lungs are clear', extra='Answer yes'
    )
    said = vlm.processor.tokenizer.decode(vlm.encode(Inputs(None, QUESTION, YN))[0]['input_ids'][0])
    assert (
        said.index('the lungs are clear')
        < said.index(QUESTION)
        < said.index('Answer yes', said.index(QUESTION) + len(QUESTION))
    )
    assert (
        vlm.info['system'] == 'the lungs are clear'
        and vlm.info['extra'] == 'Answer yes'
        and bare.info['system'] == bare.info['extra'] == ''
    )
    assert vlm.score([Inputs(FILM, QUESTION, YN)]) != bare.score([Inputs(FILM, QUESTION, YN)])


@every_family
def test_a_folder_is_described_without_loading_it(family, folders):
    told = describe_checkpoint(folders(family))
    assert (
        told['route'] == 'loader'
        and told['family'] == family
        and told['prompt']
        == ('plain prompt' if family.startswith('paligemma') else 'chat template')
    )
    json.dumps(told)


@pytest.mark.parametrize(
    'family,drop',
    [
        ('gemma3', 'token_type_ids'),
        ('paligemma', 'token_type_ids'),
        ('paligemma2', 'token_type_ids'),
        ('mllama', 'cross_attention_mask'),
    ],
)
def test_a_dropped_mask_would_show(family, drop, vlms):
    """The tests above can fail.

    Without these a family answers something else, and no error is raised.
    """
    vlm = vlms(family)
    row = extended(vlm.encode(Inputs(FILM, REPORT, YN))[0], (50, 60, 70), vlm.caps.answer_type)
    with torch.inference_mode():
        whole, less = (
            vlm._logprobs(row, 4),
            vlm._logprobs({k: v for k, v in row.items() if k != drop}, 4),
        )
    assert (whole - less).abs().max() > 1e-3


@every_family
def test_half_precision_goes_through(family, folders, vlms):
    "bfloat16 weights get bfloat16 pixels; the answers stay near those of float32."
    vlm, x = (
        load_model(folders(family), device='cpu', dtype='bfloat16'),
        [Inputs(FILM, REPORT, YN), Inputs(None, REPORT, YN)],
    )
    assert vlm.info['dtype'] == 'bfloat16'
    half, full = vlm.score(x), vlms(family).score(x)
    assert all(
        np.allclose(a.logprobs, b.logprobs, atol=1.0)
        and np.isfinite(a.logprobs).all()
        and a.pixel_sha == b.pixel_sha
        and a.token_sha == b.token_sha
        for a, b in zip(half, full)
    )


# ---------------------------------------------------------------- real tokenizers and templates
def test_real_qwen_tokenizer_and_template(real_data, tmp_path):
    source = real_data / 'tokenizers' / 'qwen2.5-vl-7b-instruct'
    if not source.is_dir():
        pytest.skip('no tokenizers/qwen2.5-vl-7b-instruct in SMSBENCH_DATA')
    tok = tf.AutoTokenizer.from_pretrained(source)
    template = json.loads((source / 'chat_template.json').read_text())['chat_template']
    vlm = load_model(
        tiny_checkpoint('qwen2_5_vl', tmp_path / 'qwen', tokenizer=tok, chat_template=template),
        device='cpu',
    )
    row, _ = vlm.encode(Inputs(FILM, QUESTION, YN))
    said = vlm.processor.tokenizer.decode(row['input_ids'][0])
    head, tail = said.split('<|vision_start|>')
    assert head == '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n'
    assert (
        tail.rstrip('\n').endswith(f'<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant')
        and tail.count('<|image_pad|>') == int(row['image_grid_thw'].prod()) // 4
    )
    table = vlm.variants(YN)
    assert (
        set(table.text) >= {'yes', ' yes', 'Yes', ' Yes', 'no', ' no', 'No', ' No'}
        and (table.ids.map(len) == 1).all()
    )
    a, b = vlm.score([Inputs(FILM, REPORT, YN), Inputs(OTHER, REPORT, YN)])
    assert a.delivered_sha != b.delivered_sha and a.token_sha == b.token_sha
    for token in ('<|im_start|>', '<|endoftext|>', '<|vision_start|>', '<|image_pad|>'):
        with pytest.raises(InputError, match='control token|place of the image'):
            vlm.score([Inputs(FILM, f'clear {token}', YN)])


def test_real_llava_med_template(real_data, tmp_path):
    source = real_data / 'tokenizers' / 'llava-med-style'
    if not source.is_dir():
        pytest.skip('no tokenizers/llava-med-style in SMSBENCH_DATA')
    template = json.loads((source / 'chat_template.json').read_text())['chat_template']
    for family in ('llava', 'llava_next'):
        folder = tiny_checkpoint(family, tmp_path / family, chat_template=template)
        vlm = load_model(folder, device='cpu')
        said = vlm.processor.tokenizer.decode(
            vlm.encode(Inputs(FILM, QUESTION, YN))[0]['input_ids'][0]
        ).replace('<image>', '')
        assert said.removeprefix('<s>') == f'[INST] \n{QUESTION} [/INST]'
        assert {' yes', ' Yes'} <= set(
            vlm.variants(YN).text
        )  # after [/INST] an answer begins with a space
        system = load_model(folder, device='cpu', system='Be brief.')
        assert '<<SYS>>\nBe brief.\n<</SYS>>' in system.processor.tokenizer.decode(
            system.encode(Inputs(FILM, QUESTION, YN))[0]['input_ids'][0]
        )
        a, b, c = vlm.score(
            [Inputs(FILM, REPORT, YN), Inputs(OTHER, REPORT, YN), Inputs(None, REPORT, YN)]
        )
        assert len({a.delivered_sha, b.delivered_sha, c.delivered_sha}) == 3


def test_real_clip_tokenizer_spells_in_pieces(real_data):
    "A tokenizer made for captions still gets every choice spelled or refused, never guessed."
    source = real_data / 'tokenizers' / 'clip'
    if not source.is_dir():
        pytest.skip('no tokenizers/clip in SMSBENCH_DATA')
    from smsbench.vlm.prompting import answer_tokens

    tok = tf.AutoTokenizer.from_pretrained(source)
    found = answer_tokens(tok, 'is it ?', ('yes', 'no', 'pneumothorax'))
    assert all(tok.decode(list(s)).strip() == c for c, ss in found.items() for s in ss) and not set(
        found['yes']
    ) & set(found['no'])


# ---------------------------------------------------------------- families of no table
def unknown_vipllava(folder):
    tok = tiny_tokenizer(['<image>'], {'image_token': '<image>'})
    vision = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    text = tf.LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tf.VipLlavaForConditionalGeneration(
        tf.VipLlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=3,
            vision_feature_layers=[-1, -2, -3],
            image_seq_length=16,
        )
    ).save_pretrained(folder)
    size = dict(height=56, width=56)
    tf.LlavaProcessor(
        tf.CLIPImageProcessor(size=size, crop_size=size),
        tok,
        patch_size=14,
        vision_feature_select_strategy='default',
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def unknown_idefics2(folder):
    tok = tiny_tokenizer(['<fake_token_around_image>', '<image>', '<end_of_utterance>'])
    config = tf.Idefics2Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
        ),
        perceiver_config=dict(
            hidden_size=32,
            resampler_n_latents=4,
            resampler_depth=1,
            resampler_n_heads=4,
            resampler_head_dim=8,
            num_key_value_heads=2,
        ),
        text_config=dict(
            model_type='mistral',
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_id=tok.convert_tokens_to_ids('<image>'),
    )
    tf.Idefics2ForConditionalGeneration(config).save_pretrained(folder)
    tf.Idefics2Processor(
        tf.Idefics2ImageProcessor(
            size=dict(shortest_edge=56, longest_edge=112), do_image_splitting=False
        ),
        tok,
        image_seq_len=4,
        chat_template=(
            "{% for m in messages %}User:{% for c in m['content'] %}{% if c['type'] == 'image'"
            " %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}\nAssistant:"
        ),
    ).save_pretrained(folder)


def unknown_aya_vision(folder):
    named = dict(image_token='<image>')
    tok = tiny_tokenizer(
        [
            '<image>',
            '<|START_OF_IMG|>',
            '<|END_OF_IMG|>',
            '<|IMG_PATCH|>',
            '<|IMG_LINE_BREAK|>',
            'TILE',
            'TILE_GLOBAL',
        ],
        named,
    )
    config = tf.AyaVisionConfig(
        vision_config=dict(
            model_type='siglip_vision_model',
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config=dict(
            model_type='cohere2',
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=tok.convert_tokens_to_ids('<|IMG_PATCH|>'),
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    tf.AyaVisionForConditionalGeneration(config).save_pretrained(folder)
    tf.AyaVisionProcessor(
        tf.GotOcr2ImageProcessor(size=dict(height=56, width=56), crop_to_patches=False),
        tok,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
    ).save_pretrained(folder)


def unknown_git(folder):
    "No placeholder at all; vision and language are one module."
    tok, size = tiny_tokenizer([]), dict(height=56, width=56)
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    tf.GitForCausalLM(
        tf.GitConfig(
            vision_config=vision,
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    ).save_pretrained(folder)
    tf.GitProcessor(tf.CLIPImageProcessor(size=size, crop_size=size), tok).save_pretrained(folder)


def unknown_florence2(folder):
    "An encoder-decoder whose processor writes the image tokens itself."
    tok, size = tiny_tokenizer(['<image>'], {'image_token': '<image>'}), dict(height=64, width=64)
    vision = dict(
        embed_dim=(8,) * 4,
        depths=(1,) * 4,
        num_heads=(2,) * 4,
        num_groups=(2,) * 4,
        window_size=4,
        projection_dim=32,
        drop_path_rate=0.0,
    )
    text = dict(
        model_type='bart',
        vocab_size=len(tok),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    tf.Florence2ForConditionalGeneration(
        tf.Florence2Config(
            vision_config=vision,
            text_config=text,
            image_token_id=tok.convert_tokens_to_ids('<image>'),
        )
    ).save_pretrained(folder)
    images = tf.CLIPImageProcessor(size=size, crop_size=size)
    images.image_seq_length = 5
    tf.Florence2Processor(images, tok, post_processor_config={}).save_pretrained(folder)


@pytest.mark.parametrize(
    'make', [unknown_vipllava, unknown_idefics2, unknown_aya_vision, unknown_git, unknown_florence2]
)
def test_a_family_of_no_table_goes_the_plain_way_and_says_so(make, tmp_path):
    torch.manual_seed(0)
    make(tmp_path)
    vlm = load_model(tmp_path, device='cpu')
    assert (
        vlm.caps is PLAIN
        and vlm.info['route'].startswith('plain')
        and vlm.info['top_level'] == 'plain'
        and describe_checkpoint(tmp_path)['top_level'] == 'plain'
    )
    own, swapped, text, nothing = answers = vlm.score(
        [
            Inputs(FILM, REPORT, YN),
            Inputs(OTHER, REPORT, YN),
            Inputs(None, REPORT, YN),
            Inputs(None, QUESTION, YN),
        ]
    )
    assert (
        all(np.isfinite(a.logprobs).all() for a in answers)
        and len({a.delivered_sha for a in answers}) == 4
    )
    assert (
        own.token_sha == swapped.token_sha
        and own.pixel_sha != swapped.pixel_sha
        and text.pixel_sha == nothing.pixel_sha == ''
    )
    assert own.logprobs != swapped.logprobs and vlm.score([Inputs(FILM, REPORT, YN)])[0] == own
    seq = (40, 41, 42)  # step by step, as the class itself decodes
    row = vlm.encode(Inputs(FILM, REPORT, YN))[0]
    with torch.inference_mode():
        steps = [float(vlm._logprobs(extended(row, seq[:i]), 1)[0, t]) for i, t in enumerate(seq)]
    with torch.inference_mode():
        assert np.isclose(vlm._sequence(row, seq), sum(steps), atol=1e-4)


def test_a_class_that_must_have_an_image_says_so(tmp_path):
    tok = tiny_tokenizer(['<image>'])
    vit = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = dict(
        model_type='opt',
        vocab_size=len(tok),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(
            vision_config=vit | dict(image_size=56, patch_size=14),
            qformer_config=vit | dict(encoder_hidden_size=32, vocab_size=len(tok)),
            text_config=text,
            num_query_tokens=4,
            image_token_index=tok.convert_tokens_to_ids('<image>'),
        )
    ).save_pretrained(tmp_path)
    tf.Blip2Processor(
        tf.BlipImageProcessor(size=dict(height=56, width=56)), tok, num_query_tokens=4
    ).save_pretrained(tmp_path)
    vlm = load_model(tmp_path, device='cpu')
    own, swapped = vlm.score([Inputs(FILM, REPORT, YN), Inputs(OTHER, REPORT, YN)])
    assert (
        own.delivered_sha != swapped.delivered_sha
        and own.token_sha == swapped.token_sha
        and np.isfinite(own.logprobs).all()
    )
    with pytest.raises(InputError, match='cannot be asked without an image'):
        vlm.score([Inputs(None, REPORT, YN)])
