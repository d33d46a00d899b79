from typing import final

@final
class Window:
    def accept(self, counter: int) -> bool: ...
