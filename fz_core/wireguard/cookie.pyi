from typing import final

@final
class CookieJar:
    def __init__(self, peer_public_key: bytes) -> None: ...
