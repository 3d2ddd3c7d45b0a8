"""Fetches the model that ships before the tests run; without it, its tests are skipped."""

from specjax.errors import SpecjaxError
from specjax.files import hub

try:
    hub.fetch_named("smollm2-135m")
except SpecjaxError as error:
    print(f"tests of smollm2-135m will be skipped: {error}")
