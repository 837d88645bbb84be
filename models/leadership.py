"""Which scheduler leads: one row, one holder, an epoch that rises with each new leader."""

from sqlalchemy import Connection, text

from tuneyard.specs.errors import StaleToken

LEAD = text("""
    UPDATE leases
    SET epoch = epoch + (CASE WHEN holder = :holder THEN 0 ELSE 1 END),
        holder = :holder,
        expires_at = clock_timestamp() + make_interval(secs => :term_s)
    WHERE name = 'scheduler' AND (holder = :holder OR expires_at < clock_timestamp())
    RETURNING epoch
""")


def lead(tx: Connection, holder: str, *, term_s: float) -> int | None:
    """Become or stay the leader; the epoch, or None while another leads."""
    return tx.execute(LEAD, {"holder": holder, "term_s": term_s}).scalar_one_or_none()


def resign(tx: Connection, holder: str) -> None:
    """Give the lead up, so that the next one need not wait for the term's end."""
    tx.execute(
        text("UPDATE leases SET expires_at = '-infinity' WHERE holder = :holder"),
        {"holder": holder},
    )


def check_epoch(tx: Connection, epoch: int) -> None:
    """Hold the lead for the length of this transaction. Raises: StaleToken when it is gone."""
    found = tx.execute(
        text(
            "SELECT 1 FROM leases WHERE name = 'scheduler' AND epoch = :epoch"
            " AND expires_at > clock_timestamp() FOR SHARE"
        ),
        {"epoch": epoch},
    ).one_or_none()
    if found is None:
        raise StaleToken("Another scheduler leads now.")
