from prfaas.simulator.agenda import Agenda


def test_things_happen_in_order_of_time_and_equal_times_in_order_of_asking() -> None:
    agenda, seen = Agenda(), []
    for name, at_s in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        agenda.at(at_s, lambda now, name=name: seen.append((name, now)))
    agenda.run()
    assert seen == [("a", 1.0), ("b", 2.0), ("c", 2.0)]


def test_what_is_asked_for_in_the_past_happens_now() -> None:
    agenda, seen = Agenda(), []
    agenda.at(5.0, lambda now: agenda.at(1.0, seen.append))
    agenda.run()
    assert seen == [5.0]


def test_run_until_stops_there_and_goes_on_later() -> None:
    agenda, seen = Agenda(), []
    agenda.at(1.0, seen.append)
    agenda.at(3.0, seen.append)
    agenda.run(2.0)
    assert (seen, agenda.now) == ([1.0], 2.0)
    agenda.run()
    assert seen == [1.0, 3.0]


def test_what_only_watches_is_told_from_what_goes_on() -> None:
    agenda, seen = Agenda(), []
    agenda.at_in_background(1.0, seen.append)
    agenda.at(2.0, seen.append)
    assert agenda.foreground == 1
    agenda.run(1.5)
    assert (seen, agenda.foreground) == ([1.0], 1)
    agenda.run()
    assert (seen, agenda.foreground) == ([1.0, 2.0], 0)
