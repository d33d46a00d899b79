from typing import final

from typing_extensions import Buffer

from fz_core.crypto import PrivateKey

def initiator_static_key_untrusted(private_key: PrivateKey | bytes, datagram: Buffer) -> bytes | None: ...

@final
class Identity: ...

@final
class Initiation: ...

@final
class Received: ...

@final
class Answer: ...
