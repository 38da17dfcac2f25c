"""Wordings of contract clauses for the demo's test data, none of which the training data uses."""

from tsugiki.server.demo.clauses import Part

_TEXTS = {
    "termination-for-convenience": """
        [who: Both parties have | {recipient} has | {provider} has] the option to leave {agreement} early with notice of
        {days} and no grounds, whereupon {due} must be settled.

        No justification is needed for [who: one party or the other | {recipient} | {provider}] to discontinue {agreement}
        {days} after saying so, and {due} follows.

        Upon a notice of {days}, {agreement} ceases at the election of [who: any party | {recipient} | {provider}] even if
        nobody defaulted, giving a claim to {due}.
        """,
    "termination-for-breach": """
        Where {breach} has not been put right {days} after a warning, {agreement} may be dissolved forthwith, and
        prepayments [refund: are given back | are lost].

        Should {breach} persist for {days} after notification, the injured party is free to cancel {agreement}
        [refund: with | without] reimbursement of charges prepaid.

        The defaulting party has {days} to remove {breach}, failing which {agreement} is over, and money received up front
        [refund: has to be repaid | need not be repaid].
        """,
    "confidentiality": """
        Secrets learned from the counterparty stay protected for {years}, and their release to {confidant} is
        [share: acceptable | unacceptable].

        Each side promises to treat proprietary information as confidential for {years}; {confidant} [share: are | are not]
        allowed to see it.

        During {years}, non-public information must be guarded, [share: although | and not even] {confidant} may learn of
        it.
        """,
    "limitation-of-liability": """
        {provider}'s responsibility for all claims is restricted to {amount}, [cover: inclusive | exclusive] of {loss}.

        Under {agreement}, {recipient} obtains at most {amount} from {provider}, and {loss} [cover: is | is not] compensated.

        The upper limit on what {provider} owes is {amount}; amends for {loss} are [cover: part of that sum | ruled out].
        """,
    "indemnification": """
        [who: {provider} | {recipient}] agrees to hold its counterparty harmless, for a sum not above {amount}, from demands
        based on {claim}.

        Outsiders' claims that stem from {claim} shall be met by [who: {provider} | {recipient}] until {amount} is reached.

        To a limit of {amount}, the costs of legal proceedings over {claim} are for the account of [who: {provider} |
        {recipient}].
        """,
    "governing-law": """
        {agreement} is to be construed under the legal system of {place}, and conflicts are resolved through {forum}.

        All questions concerning {agreement} are subject to {place} law and, in case of quarrel, to {forum}.

        Only {forum} can rule on differences between the parties, for which the statutes of {place} are authoritative.
        """,
    "payment-terms": """
        Every debt must be settled by {recipient} not later than {days} following {trigger}, and netting with other sums is
        [setoff: admissible | inadmissible].

        {recipient} has {days} to pay, starting with {trigger}, and [setoff: can | cannot] deduct what it is owed.

        Sums become payable on expiry of {days} after {trigger}; {recipient} [setoff: retains | waives] the right of set-off.
        """,
    "late-payment-interest": """
        On every late payment {recipient} owes interest of {percent} per year from [start: the agreed date | the dispatch of
        a dunning letter], and {provider} can {sanction}.

        Amounts unpaid attract {percent} yearly interest with effect from [start: their due day | a written warning];
        {provider} is at liberty to {sanction}.

        Delay costs {recipient} {percent} a year, beginning [start: on the contractual pay day | upon a notice of default],
        and empowers {provider} to {sanction}.
        """,
    "warranty": """
        For {months} following delivery {provider} vouches for freedom from defects, failing which it owes {remedy}.

        If a fault appears before {months} are over, {recipient} has a claim to {remedy}.

        {recipient} may demand {remedy} for flaws discovered in the first {months}.
        """,
    "force-majeure": """
        Natural disaster, strike or government action lasting {days} brings about {relief}, and sums payable [pay: are
        deferred | fall due as usual].

        If an obstacle outside reasonable control persists for {days}, {relief} can be requested, while paying is
        [pay: not required | still required].

        A hindrance for which nobody answers excuses all performance, [pay: money included | money excepted], and at the end
        of {days} there is {relief}.
        """,
    "assignment": """
        Ceding {agreement} to {assignee} is [consent: valid only if | valid even if not] approved by {recipient}, who is
        told of it {days} in advance.

        Giving notice of {days}, {provider} can convey its position in {agreement} to {assignee}, [consent: on condition
        that | irrespective of whether] {recipient} consents.

        {provider} [consent: needs | does not need] permission to pass {agreement} to {assignee}, and shall notify this
        {days} earlier.
        """,
    "non-compete": """
        When {agreement} is over, {provider} [ban: must abstain from | is at liberty to begin] {activity} for {months}.

        The covenant of {provider} lasts {months}, and {activity} is [ban: covered by | exempt from] it.

        During the {months} that follow {agreement}, {activity} is [ban: closed | open] to {provider}.
        """,
    "data-protection": """
        A breach of personal data is communicated in not more than {hours}, their export is [abroad: admissible |
        inadmissible], and {provider} shall ultimately {disposal}.

        {provider} has {hours} to tell of lost personal information, [abroad: is allowed | is not allowed] to send it across
        the border, and must {disposal} when the services are finished.

        Cross-border transfer is [abroad: open | closed] to {provider}, which alerts {recipient} to an incident within
        {hours} and undertakes to {disposal} afterwards.
        """,
    "intellectual-property": """
        {provider} is the proprietor of {work}; {recipient} obtains for {place} a right of use which is [licence: exclusive |
        simple and not exclusive].

        Rights in {work} are the property of {provider}, who licenses them in {place} to {recipient} [licence: and nobody
        else | and to whomever else it pleases].

        {recipient} may use {work} in {place} under [licence: an exclusive | a non-exclusive] licence from {provider}, the
        owner.
        """,
    "audit-rights": """
        {recipient} can have {subject} reviewed if it says so {days} earlier, the expense being carried by
        [cost: {provider} | {recipient}].

        {provider} tolerates a check of {subject} upon a warning of {days}, the price of which [cost: {provider} |
        {recipient}] has to pay.

        Access to {subject} is given to {recipient} {days} after a request, and [cost: {provider} | {recipient}] meets the
        reviewing charges.
        """,
    "renewal": """
        When its term is over, {agreement} continues for another {months} [mode: of its own accord | solely by signed
        extension], and {price} will apply.

        {agreement} goes on for {months} [mode: without any declaration | by mutual declaration], the parties having settled
        on {price}.

        A new period of {months} follows [mode: tacitly | through the accord of both sides] and entails {price}.
        """,
}

TEST = Part(
    texts=_TEXTS,
    values={
        "days": (4, 8, 11, 15, 18, 25, 40, 75, 100, 180),
        "hours": (4, 8, 11, 16, 18, 25, 32, 40, 48, 100),
        "months": (4, 8, 9, 11, 15, 18, 27, 40, 48, 75),
        "percent": (4, 8, 9, 11, 13, 15, 16, 17, 18, 25),
        "years": (4, 8, 9, 11, 13, 15, 16, 18, 25, 40),
        "amount": (75_000, 150_000, 180_000, 300_000, 400_000, 600_000, 900_000, 1_500_000, 4_000_000, 8_000_000),
        "place": (
            *("Belgium", "Brazil", "Delaware", "France", "Hong Kong", "the Netherlands", "Scotland", "Sweden"),
            *("Texas", "Victoria"),
        ),
        "due": (
            "payment for finished work | the charges earned so far",
            "a refund of costs incurred | the expenditure of the other side",
            "a flat cancellation charge | an agreed exit payment",
            "no money | no consideration of any kind",
        ),
        "breach": (
            "default in payment | a debt in arrears",
            "a shipment behind schedule | tardy supply",
            "substandard performance | the supply of faulty items",
            "betrayal of secrets | an unauthorised publication of know-how",
        ),
        "confidant": (
            "associated companies | members of the corporate family",
            "attorneys and accountants | outside solicitors",
            "firms engaged for part of the job | sub-suppliers",
            "supervisory bodies | state officials",
        ),
        "loss": (
            "profit forgone | income not earned",
            "the disappearance of data | damage to databases",
            "injury to its good name | a tarnished image",
            "a standstill of operations | plant stoppage",
        ),
        "claim": (
            "violated trade marks or patents | piracy of protected works",
            "wounds and fatalities | injured people",
            "illegal acts | disregard of legislation",
            "disputes with workers | payroll debts",
        ),
        "forum": (
            "the public courts | a court of law",
            "an arbitrator | arbitral proceedings",
            "a conciliator | a mediation procedure",
            "a specialist acting as expert | an expert opinion",
        ),
        "trigger": (
            "the coming in of the bill | presentation of an invoice",
            "the coming in of the goods | unloading of the consignment",
            "sign-off of the result | passing of the final inspection",
            "the close of the month | the final day of that month",
        ),
        "sanction": (
            "put its work on hold | withhold supplies",
            "bill the cost of debt recovery | add dunning charges",
            "declare everything immediately payable | require the full balance straight away",
            "take back bonuses | annul price concessions",
        ),
        "remedy": (
            "rectification | fixing of the article",
            "a substitute product | supply of another piece",
            "reimbursement of what was paid | the sum paid",
            "abatement of the price | a cheaper rate",
        ),
        "relief": (
            "postponed due dates | additional time",
            "an end to the relationship | rescission",
            "fresh bargaining on the conditions | discussions about a revision",
            "buying from others | alternative sourcing",
        ),
        "assignee": (
            "a related company | a member of its group",
            "the new owner of the enterprise | the entity it merges with",
            "a creditor | whoever funds it",
            "a market opponent | an enterprise that competes",
        ),
        "activity": (
            "activity in the same trade | trading as a rival",
            "engaging the workforce | enticing workers away",
            "addressing the clientele | canvassing of accounts",
            "financing an opponent | acquiring equity of a market rival",
        ),
        "disposal": (
            "give back the records | restore the files to their owner",
            "wipe the records | purge all files",
            "strip the records of identities | de-identify the files",
            "preserve the records | hold the files in a vault",
        ),
        "work": (
            "the applications and their code | the programmed modules",
            "new technical solutions | discoveries fit for a patent",
            "signs and brands | the company logo",
            "papers and sketches | the documentation",
        ),
        "subject": (
            "the bookkeeping | financial statements",
            "network protection | servers and firewalls",
            "plants and buildings | the sites",
            "staff welfare | working hours and pay",
        ),
        "price": (
            "prices as before | an identical tariff",
            "a tariff tied to the cost of living | charges that rise with inflation",
            "a lower tariff | a rebate on the charges",
            "a tariff still to be bargained | charges discussed anew",
        ),
    },
    roles=(
        ("the Vendor", "the Purchaser"),
        ("the Contractor", "the Principal"),
        ("the Operator", "the Subscriber"),
    ),
    agreements=("this Deed", "this Instrument"),
)
