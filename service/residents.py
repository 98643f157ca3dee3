"""Which models are in memory: used last, unloaded last."""

from collections import OrderedDict
from collections.abc import Collection, Mapping

from service.model import Key, Model


class Residents:
    """Loaded models. `limit` of 0 is none in all; of each model one version stays beside those that
    are kept anyway, so that memory is bounded by what is active."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._models: OrderedDict[Key, Model] = OrderedDict()  # used last, last

    def all(self) -> list[Model]:
        return list(self._models.values())

    def get(self, key: Key) -> Model | None:
        return self._models.get(key)

    def use(self, key: Key) -> Model | None:
        """The model, if it is loaded, which is now the one used last."""
        model = self._models.get(key)
        if model is not None:
            self._models.move_to_end(key)
        return model

    def add(self, model: Model) -> None:
        self._models[model.key] = model
        self._models.move_to_end(model.key)

    def drop(self, key: Key) -> Model | None:
        return self._models.pop(key, None)

    def surplus(self, active: Mapping[str, int], kept: Collection[Key]) -> list[Key]:
        """Which to unload: beside `kept` and active ones all but the last used of each name, then
        the least recently used, idle ones first, until the rest is within the limit.

        `kept` don't count, and what was used last stays.
        """
        others = [key for key in self._models if key not in kept]
        last_of = {name: version for name, version in others if active.get(name) != version}
        surplus = [
            (name, version)
            for name, version in others
            if version not in (active.get(name), last_of.get(name))
        ]
        rest = [key for key in others if key not in surplus]
        if self.limit:
            oldest = [key for key in rest if key != next(reversed(self._models))]
            oldest.sort(key=lambda key: self._models[key].batcher.busy)  # stable
            surplus += oldest[: max(0, len(rest) - self.limit)]
        return surplus
