"""What a new policy means for peers that are connected (`spec/portal-protocol.md` §8.11). Deletions go first."""

from __future__ import annotations

from fz_core.embedded import portal_views as views
from fz_core.embedded.policy import ClientAccount, GatewayAccount, Policy, ResourceRule
from fz_core.embedded.portal_access import Access
from fz_core.embedded.portal_hub import Hub, log
from fz_core.embedded.portal_session import Session, owner_of
from fz_core.embedded.portal_versions import SITE_CHANGE, understands
from fz_core.portal import client as to_client
from fz_core.portal import gateway as to_gateway
from fz_core.portal.types import Authorization, GatewayInterface, Resource


def apply_policy(hub: Hub, access: Access, policy: Policy, now: float) -> None:
    """Put `policy` in force: expel, revoke, inform."""
    old = hub.policy
    seen = {s.id: views.resources(old, hub.store, s) for s in hub.joined("client")}
    faces = {s.id: views.interface(old, s.device) for s in hub.joined("client") if s.device}
    hub.policy = policy
    for session in list(hub.sessions.values()):
        _recheck(hub, session, old)
    revoked = _revoke(hub, access, now)
    for session in list(hub.joined("client")):
        assert session.device is not None
        face = views.interface(policy, session.device)
        if face != faces[session.id]:
            hub.send(session, to_client.ConfigChanged(face))
        _update_client(hub, access, session, seen[session.id], old, revoked)
    _update_filters(hub, old, policy)
    if old.account != policy.account:
        _resend_init(hub)


def _recheck(hub: Hub, session: Session, old: Policy) -> None:
    """Expel peers whose token is gone; send those away whose token now means somebody else."""
    policy = hub.policy
    if session.role == "relay":
        if session.token not in policy.relay_tokens:
            hub.expel(session)
        return
    account = owner_of(policy, session.role, session.token)
    if account is None:
        log.info("Token revoked role=%s name=%s", session.role, session.name)
        hub.expel(session)
    elif _owner(policy, account) != _owner(old, session.account):
        hub.close(session, "the token belongs to another account now")
    else:
        if isinstance(account, ClientAccount) and account.expires_at is not None:
            hub.timers.set(("token", str(session.id)), hub.monotonic(account.expires_at))
        else:
            hub.timers.cancel(("token", str(session.id)))
        session.account = account


def _owner(policy: Policy, account: ClientAccount | GatewayAccount | None) -> str:
    if isinstance(account, GatewayAccount):
        return policy.sites[account.site].id
    return "" if account is None else account.id


def _revoke(hub: Hub, access: Access, now: float) -> set[tuple[str, str]]:
    """Take back every grant the policy does not give any more; their (client, resource) pairs."""
    revoked = set()
    for grant in hub.store.grants():
        if not access.is_allowed(grant, now):
            access.revoke(grant)
            revoked.add((grant.client_id, grant.resource_id))
    return revoked


def _update_client(
    hub: Hub, access: Access, session: Session, before: dict[str, Resource], old: Policy, revoked: set[tuple[str, str]]
) -> None:
    after = views.resources(hub.policy, hub.store, session)
    for resource_id in before:
        if resource_id not in after:
            access.void(resource_id, session)
            hub.send(session, to_client.ResourceDeleted(resource_id))
    for resource_id, view in after.items():
        was_revoked = (session.peer_id, resource_id) in revoked
        if view == before.get(resource_id) and not was_revoked:
            continue
        was, rule = old.resource(resource_id), hub.policy.resource(resource_id)
        if was is not None and rule is not None and resource_id in before:
            if was.fingerprint != rule.fingerprint:
                access.void(resource_id, session)
            if _must_delete_first(session, was, rule, view == before[resource_id]):
                hub.send(session, to_client.ResourceDeleted(resource_id))
        hub.send(session, to_client.ResourceCreatedOrUpdated(view))


def _must_delete_first(session: Session, was: ResourceRule, rule: ResourceRule, looks_equal: bool) -> bool:
    """An equal view changes nothing at the client; an old client cannot move a resource; a type cannot change."""
    if rule.kind == "internet" and looks_equal:
        return False
    moved = was.site != rule.site and not (session.agent and understands(session.agent, SITE_CHANGE))
    return looks_equal or moved or was.kind != rule.kind


def _update_filters(hub: Hub, old: Policy, policy: Policy) -> None:
    """Tell receivers about new filters of what they serve."""
    for rule in policy.resources.values():
        was = old.resource(rule.id)
        if was is None or was.filters == rule.filters or was.fingerprint != rule.fingerprint:
            continue
        holders = dict.fromkeys(g.receiver_id for g in hub.store.grants() if g.resource_id == rule.id)
        for receiver_id in holders:
            gateway, client = hub.peer(receiver_id, "gateway"), hub.peer(receiver_id, "client")
            if gateway is not None and rule.site is not None:
                hub.send(gateway, to_gateway.ResourceUpdated(views.gateway_resource(rule)))
            elif client is not None:
                hub.send(client, to_client.ResourceFiltersUpdated(rule.id, rule.filters))


def _resend_init(hub: Hub) -> None:
    """The account's slug reaches gateways only this way."""
    for session in hub.joined("gateway"):
        assert session.device is not None
        grants = tuple(
            Authorization(g.client_id, g.resource_id, g.expires_at) for g in hub.store.grants_at(session.peer_id)
        )
        face = GatewayInterface(session.device.ipv4, session.device.ipv6)
        relays = hub.relays_for(session)
        hub.send(session, to_gateway.Init(face, relays, grants, hub.policy.account, views.FLOW_LOGS))
