"""A year of a job's schedule, as Prefect's scheduler lays its runs ahead, by a clock that is moved by hand."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from prefect.server.schemas.schedules import CronSchedule

from tests.conftest import make_job

BERLIN = ZoneInfo("Europe/Berlin")
BEGIN, END = datetime(2027, 1, 1, tzinfo=BERLIN), datetime(2028, 1, 1, tzinfo=BERLIN)


def days_of(runs: set[datetime]) -> list[date]:
    """The local day of each run; one that a change of the clock moved stays on its day."""
    return sorted(run.astimezone(BERLIN).date() for run in runs if BEGIN <= run < END)


# On 28 March 2027 there is no 02:30 in Berlin, and on 31 October there are two.
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 3 * * *"])
def test_a_year_has_a_night_a_day_though_the_clock_is_changed_twice_and_once_put_back(cron: str) -> None:
    job = make_job(schedule={"cron": cron, "timezone": "Europe/Berlin"})
    assert job.schedule.cron is not None
    schedule = CronSchedule(cron=job.schedule.cron, timezone=job.schedule.timezone)
    hours = [BEGIN.astimezone(UTC) - timedelta(hours=1) + timedelta(hours=number) for number in range(366 * 24)]
    put_back = [hour - timedelta(hours=2) for hour in hours[5000:5010]]
    # The scheduler looks every half a day, and every hour in the days around each move of a clock.
    odd = [hours.index(datetime(2027, *day, tzinfo=UTC)) for day in ((3, 28), (10, 31))] + [5000]
    looks = [
        number for number in range(len(hours)) if number % 12 == 0 or any(abs(number - moved) < 60 for moved in odd)
    ]

    async def laid_ahead() -> set[datetime]:
        """By its due time a run is known: Prefect makes no second one for it."""
        known: set[datetime] = set()
        before, after = ([hours[number] for number in looks if (number < 5010) is early] for early in (True, False))
        for now in (*before, *put_back, *after):
            known.update(await schedule.get_dates(n=3, start=now))
        return known

    with ThreadPoolExecutor(1) as thread:  # in this one a browser's event loop may run
        runs = thread.submit(asyncio.run, laid_ahead()).result()
    assert days_of(runs) == [BEGIN.date() + timedelta(days=number) for number in range(365)]
