"""The demo, phase by phase; a finished phase is kept, so an interrupted demo goes on where it stopped."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from multitap_jax.config import TrainConfig
from multitap_jax.demo.checkpoint import build_checkpoint
from multitap_jax.demo.report import ReportData, write_report
from multitap_jax.demo.settings import demo_config
from multitap_jax.demo.texts import OBJECTIVES
from multitap_jax.demo.world import WorldPaths, build_world
