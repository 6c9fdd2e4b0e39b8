"""onnxruntime without PyTorch: what an application imports to run an artifact.

`Decoder` serves tokens from a block with a cache; `Session` runs any graph on the provider asked
for and says where its nodes really went.
"""

from rope_export.artifacts.cache_layout import CacheLayout as CacheLayout
from rope_export.artifacts.cache_layout import LayerCache as LayerCache
from rope_export.artifacts.targets import ENDPOINTS as ENDPOINTS
from rope_export.runtime.decoder import Decoder as Decoder
from rope_export.runtime.machine import Machine as Machine
from rope_export.runtime.providers import available_memory as available_memory
from rope_export.runtime.providers import environment as environment
from rope_export.runtime.providers import require as require
from rope_export.runtime.providers import unavailable_reason as unavailable_reason
from rope_export.runtime.session import Session as Session
from rope_export.runtime.session import from_ort as from_ort
from rope_export.runtime.session import on_device as on_device
