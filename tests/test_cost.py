"""Money: worked examples of self-hosting against an API, the right side of utilisation, training, the report."""

import datetime
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from fewfire.errors import ConfigError
from fewfire.plan import plan
from fewfire.plan.api_prices import load_api_prices
from fewfire.plan.cost import Costs, Demand, choose_host, self_host
from fewfire.plan.hardware import Payment, load_catalogue, owned_usd_per_hour

GPT_OSS = load_api_prices().models["gpt-oss-120b"]


def host_of(name, hardware, batch=None, demand=None, **options):
    made = plan(name, hardware=hardware, batch=batch, context=2048, demand=demand, **options)
    return made, self_host(made.machines[0], demand or Demand())


def test_worked_example_of_one_h100():
    made, host = host_of("gpt-oss-120b", "H100", batch=64, price=2.95)
    assert GPT_OSS.blended(0.25) == pytest.approx(0.2625)
    assert host.bill == pytest.approx(2153.5)
    assert host.break_even(0.2625) == pytest.approx(8.2e9, rel=0.01)
    assert made.machines[0].full_load.tokens_per_s == pytest.approx(2634, rel=0.15)
    sentence = Costs(Demand(), host, GPT_OSS, None, "").sentence
    assert sentence.startswith("Below 8.2 billion tokens a month the API is cheaper")


def test_worked_example_of_deepseek_on_eight_h200():
    _, host = host_of("deepseek-v3", "8xH200", price=3.50)
    prices = load_api_prices().models["deepseek-v3"]
    assert host.bill == pytest.approx(20_440)
    assert prices.blended(0.25) == pytest.approx(0.988, abs=0.001)
    assert host.break_even(prices.blended(0.25)) == pytest.approx(20.7e9, rel=0.01)


def test_utilisation_divides_the_bill():
    _, host = host_of("gpt-oss-120b", "H100", price=2.95)
    assert host.per_million(1e8) == pytest.approx(10 * host.per_million(1e9))
    assert host.per_million(host.useful_capacity) < host.per_million(host.useful_capacity / 2)


def test_volume_beyond_one_system_buys_whole_ones():
    _, host = host_of("gpt-oss-120b", "H100", price=2.95)
    assert host.systems(host.useful_capacity * 1.01) == 2
    assert host.monthly(host.useful_capacity * 1.01) == 2 * host.bill


def test_bursts_take_capacity_and_ops_raise_the_floor():
    _, calm = host_of("gpt-oss-120b", "H100", price=2.95)
    _, bursty = host_of("gpt-oss-120b", "H100", price=2.95, demand=Demand(burstiness=2, ops_usd_per_month=500))
    assert bursty.useful_capacity == pytest.approx(calm.useful_capacity / 2)
    assert bursty.floor_usd_per_month == calm.floor_usd_per_month + 500
    assert bursty.break_even(0.2625) > calm.break_even(0.2625)


def test_between_systems_the_api_can_be_cheaper_again():
    demand = Demand(1.6e10, burstiness=2)
    _, host = host_of("gpt-oss-120b", "H100", price=2.95, demand=demand)
    assert host.break_even(0.2625) < 1.6e10 and host.monthly(1.6e10) > 0.2625 * 1.6e4
    throughout = host.pays_throughout(0.2625)
    assert all(host.monthly(throughout * (1 + step / 50)) <= 0.2625 * throughout * (1 + step / 50) / 1e6 + 1
               for step in range(1, 400))  # fmt: skip
    assert "throughout from" in Costs(demand, host, GPT_OSS, None, "").sentence


def test_a_break_even_beyond_capacity_is_none():
    _, host = host_of("deepseek-v3", "8xH200", price=3.50, batch=1)
    assert host.break_even(0.01) is None
    costs = Costs(Demand(), host, replace(GPT_OSS, input=0.01, output=0.01), None, "")
    assert "cheaper at any volume" in costs.sentence


def test_the_sentence_picks_by_volume():
    _, host = host_of("gpt-oss-120b", "H100", price=2.95)
    low, high = Demand(1e9), Demand(2e10)
    assert "the managed API is cheaper" in Costs(low, replace(host, demand=low), GPT_OSS, None, "").sentence
    assert "self-hosting is cheaper" in Costs(high, replace(host, demand=high), GPT_OSS, None, "").sentence


def test_a_smaller_dense_model_is_named_when_it_costs_less_than_half():
    made = plan("kimi-k2", hardware="16xH200", demand=Demand(5e9))
    assert made.costs.dense is not None and "32.9b" in made.costs.sentence
    assert [route.name.split(",")[0] for route in made.costs.routes()] == ["self-host", "managed API", "dense 32.9b"]


def test_routes_say_where_the_text_goes_and_what_leaving_takes():
    for route in plan("mixtral-8x7b", demand=Demand(1e9)).costs.routes():
        assert route.text_goes and route.providers and route.leaving


def test_a_model_no_api_lists_is_hosted_or_not_at_all():
    assert "No API lists" in plan("dbrx", hardware="8xH100").costs.sentence
    assert choose_host([], Demand(), None) is None


def test_currency_changes_words_and_no_numbers():
    dollars = plan("gpt-oss-120b", hardware="H100", demand=Demand(1e9))
    shillings = plan("gpt-oss-120b", hardware="H100", demand=Demand(1e9), currency=("KES", 129.0))
    assert "KES" in shillings.costs.sentence and "$" not in shillings.costs.sentence
    assert dollars.to_json()["cost"]["self_host"] == shillings.to_json()["cost"]["self_host"]


def test_owned_hardware():
    assert owned_usd_per_hour(26_298, 3, 1.0, 0.20) == pytest.approx(1.2)


def test_how_machines_are_paid():
    prices = [plan("gpt-oss-120b", hardware="H100", price=Payment(pricing=name)).machines[0].usd_per_hour
              for name in ("on-demand", "own-hyperscaler", "own-smaller-cloud", "rent-3-years")]  # fmt: skip
    assert prices == [2.95, 1.3, 1.69, 1.3]
    bought = plan("gpt-oss-120b", hardware="H100", price=Payment(buy_usd=26_298)).machines[0]
    assert bought.usd_per_hour == pytest.approx(1.0 + 1.73 * 0.15)
    assert plan("gpt2", hardware="L4", price=Payment(pricing="rent-3-years")).machines[0].usd_per_hour is None
    with pytest.raises(ConfigError, match="rent-3-years"):
        Payment(pricing="free")


def test_output_tokens_cost_more_than_input():
    machine = plan("mixtral-8x7b", hardware="2xH100").machines[0]
    assert machine.usd_per_million_input < machine.usd_per_million_blended < machine.usd_per_million_output


@pytest.mark.parametrize(
    "bad", [{"tokens_per_month": 0}, {"burstiness": 0.5}, {"output_share": 2}, {"ops_usd_per_month": -1}]
)
def test_absurd_demands_are_refused(bad):
    with pytest.raises(ConfigError):
        Demand(**bad)


@pytest.mark.parametrize("price", [0, -1])
def test_prices_of_zero_are_refused(price):
    with pytest.raises(ConfigError, match="above 0"):
        plan("mixtral-8x7b", hardware="H100", price=price)


def test_training_cost_is_near_the_published_one():
    """DeepSeek-V3: 14.8T tokens in 2.664M H800 hours of pre-training, in FP8."""
    training = plan("deepseek-v3", hardware="2048xH800", train_tokens=14.8e12).training
    assert training.flops == pytest.approx(6 * 36.6e9 * 14.8e12, rel=0.5)
    assert training.device_hours == pytest.approx(2.664e6, rel=0.5)
    assert training.devices_for_memory > 100 and training.usd > 0


def test_old_prices_are_said_to_be_old(monkeypatch):
    catalogue = load_catalogue()
    assert catalogue.price_age_days(datetime.date(2027, 6, 28)) == 365
    from fewfire.plan import plan as module

    class Later(datetime.date):
        @classmethod
        def today(cls):
            return cls(2028, 1, 1)

    monkeypatch.setattr(datetime, "date", Later)
    words = " ".join(plan("mixtral-8x7b", hardware="H100").warnings)
    assert "machine prices" in words and "API prices" in words and "days old" in words
    assert module is not None


# ------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def page():
    from fewfire.plan.simulate import Traffic

    return plan(
        "gpt-oss-120b",
        hardware="H100,8xH200,laptop-16",
        versus="llama-2-70b",
        demand=Demand(1e10, burstiness=2),
        traffic=Traffic(200),
    ).to_html()


def test_the_page_stands_alone(page):
    assert not re.search(r'(src|href)="|<script|@import|url\(', page)
    assert page.count("<svg") == 4 and len(page) < 200_000


def test_every_chart_is_well_formed_and_has_no_bad_numbers(page):
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(chart)
    assert not re.search(r"\b(nan|inf)\b", page)


def test_the_page_says_what_the_plan_says(page):
    for words in ("Computes like a 5.13B dense model", "Cost against volume", "Speed against batch", "What fills",
                  "Where the figures come from", "vllm serve", "A simulated day", "Beside llama-2-70b"):  # fmt: skip
        assert words in page


def test_every_figure_has_formula_numbers_and_source():
    rows = plan("mixtral-8x7b", hardware="2xH100", demand=Demand(1e9)).explain()
    assert {
        "parameters.total",
        "memory.kv_cache_bytes",
        "per_token.bytes_read",
        "cost.break_even_tokens_per_month",
    } <= {row.name for row in rows}
    assert all(row.formula and row.numbers and row.source for row in rows)


def test_an_unknown_figure_names_the_nearest():
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        plan("mixtral-8x7b", hardware="H100").explain("kv_cash_bites")
