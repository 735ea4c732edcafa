from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
licenses = {'apache2': 'Apache-2.0'}
statuses = ['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    license=licenses[cfg['license']],
    keywords=cfg['keywords'].split(),
    classifiers=[f"Development Status :: {int(cfg['status'])} - {statuses[int(cfg['status']) - 1]}",
                 f"Intended Audience :: {cfg['audience']}",
                 f"Natural Language :: {cfg['language']}",
                 'Programming Language :: Python :: 3',
                 *(f'Programming Language :: Python :: {version}' for version in cfg['pythons'].split())],
    packages=find_packages(include=[f"{cfg['lib_path']}*"]),
    # the pretrained weights; what the pages of the docs are made with; a word to type checkers that there are types
    package_data={cfg['lib_path']: ['*.safetensors', 'assets/*', 'py.typed']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={name.removesuffix('_requirements'): packages.split() for name,packages in cfg.items() if name.endswith('_requirements')},
    # the first group is how nbdev finds a package's symbols, for links from its docs and from others'
    entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                  'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
