# Constants of the WireGuard paper (sections 5.4 and 6.1), and none of this implementation.
# Spec: connectivity.md sections 6.1 and 6.3.

cdef enum:
    MESSAGE_INITIATION = 1
    MESSAGE_RESPONSE = 2
    MESSAGE_COOKIE = 3
    MESSAGE_DATA = 4

    INITIATION_LENGTH = 148
    RESPONSE_LENGTH = 92
    COOKIE_LENGTH = 64
    DATA_HEADER_LENGTH = 16
    DATA_OVERHEAD = 32
    MAC_LENGTH = 16
    PUBLIC_KEY_LENGTH = 32
    TIMESTAMP_LENGTH = 12

    # seconds
    REKEY_AFTER_TIME = 120
    REJECT_AFTER_TIME = 180
    WIPE_AFTER_TIME = 540
    COOKIE_LIFETIME = 120
