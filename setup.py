"Builds the package from settings.ini; edit there, not here."

from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = cfg['lib_path']

setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    url=cfg['git_url'],
    python_requires='>=' + cfg['min_python'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    # Run notebooks and manifests lie where people look for them; they are installed too.
    packages=setuptools.find_packages(include=[lib, f'{lib}.*'])
    + [f'{lib}.runs', f'{lib}.data_manifests'],
    package_dir={f'{lib}.runs': 'nbs/runs', f'{lib}.data_manifests': 'data_manifests'},
    package_data={
        lib: ['aliases.json'],
        f'{lib}.audit': ['*.yaml'],
        f'{lib}.runs': ['*.ipynb'],
        f'{lib}.data_manifests': ['*.yaml'],
        f'{lib}.testing': ['reference_*/*'],
        f'{lib}.report': ['template/*/*'],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=cfg['requirements'].split(),
    extras_require={
        k: cfg[f'{k}_requirements'].split() for k in ('dev', 'quantization', 'umap', 'results')
    },
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
)
