"""Wordings of contract clauses for the demo's training data; `server/demo/clauses.py` explains the notation."""

from tsugiki.server.demo.clauses import Part

_TEXTS = {
    "termination-for-convenience": """
        [who: Either party | {recipient} | {provider}] may terminate {agreement} without cause on written notice of {days},
        and {due} shall then be owed.

        Without stating a reason, [who: each of the parties | {recipient} | {provider}] is entitled to end {agreement}
        after {days}; the other side receives {due}.

        {agreement} may be cancelled for convenience by [who: either side | {recipient} | {provider}], effective {days}
        after notice, which results in {due}.

        The right to withdraw for any reason or none belongs to [who: both parties | {recipient} | {provider}], subject to
        a notice of {days}; {due} will be payable.
        """,
    "termination-for-breach": """
        If {breach} is not cured within {days} of written notice, {agreement} may be terminated, and fees paid in advance
        [refund: shall | shall not] be refunded.

        {breach} which lasts for {days} despite a reminder entitles the other party to end {agreement}; prepaid amounts
        [refund: must be returned | may be kept].

        The innocent party may rescind {agreement} once a grace period of {days} for {breach} has passed in vain,
        [refund: and any advance is repaid | and any advance is forfeited].

        Termination for cause requires {breach} left unremedied for {days}; sums paid beforehand [refund: are | are not]
        to be repaid.
        """,
    "confidentiality": """
        The parties shall keep confidential information secret for {years} and [share: may | may not] disclose it to
        {confidant}.

        For {years} the duty of secrecy binds both sides; passing information on to {confidant} is [share: permitted |
        prohibited].

        Confidential materials must not be revealed to outsiders for {years}; {confidant} [share: do not count | count] as
        outsiders.

        Non-disclosure is owed for {years} and [share: allows | does not allow] sharing with {confidant}.
        """,
    "limitation-of-liability": """
        The total liability of {provider} shall not exceed {amount}, and {loss} [cover: is included | is excluded].

        {provider} is liable up to a maximum of {amount} in the aggregate, [cover: including | excluding] {loss}.

        In no event shall claims against {provider} go beyond {amount}; compensation for {loss} [cover: may | may not] be
        claimed.

        Damages payable by {provider} are capped at {amount}, and {recipient} [cover: can | cannot] recover {loss}.
        """,
    "indemnification": """
        [who: {provider} | {recipient}] shall indemnify the other party, up to {amount}, against third-party claims arising
        from {claim}.

        [who: {provider} | {recipient}] undertakes to defend the other side from actions on account of {claim} and to bear
        costs of {amount} at most.

        Where a party is sued because of {claim}, [who: {provider} | {recipient}] will make good all losses, limited to
        {amount}.

        Losses of up to {amount} which result from {claim} shall be reimbursed by [who: {provider} | {recipient}].
        """,
    "governing-law": """
        {agreement} shall be governed by the laws of {place}, and any dispute shall be finally settled by {forum}.

        The law of {place} governs {agreement}, and all controversies are to be brought before {forum}.

        Any disagreement arising from {agreement} will be decided by {forum} under the rules of {place}.

        The parties choose {place} law for {agreement} and agree to refer their disputes to {forum}.
        """,
    "payment-terms": """
        {recipient} shall pay within {days} of {trigger} and [setoff: may | may not] set off counterclaims.

        Payment falls due {days} after {trigger}; deduction of counterclaims is [setoff: allowed | not allowed].

        The price is payable in full no later than {days} from {trigger}, and {recipient} [setoff: is | is not] entitled to
        offset its own claims.

        {provider} grants a payment period of {days}, counted from {trigger}, [setoff: with | without] a right of set-off.
        """,
    "late-payment-interest": """
        Overdue amounts bear interest at {percent} per annum from [start: the due date | the date of a reminder], and
        {provider} may {sanction}.

        If {recipient} is late in paying, interest of {percent} accrues as of [start: the payment day | a written demand];
        {provider} is also entitled to {sanction}.

        {provider} charges {percent} annual interest on arrears [start: once the due date has passed | once a reminder was
        sent] and has the right to {sanction}.

        Any sum in arrears carries {percent} yearly interest from [start: maturity | receipt of a reminder], which allows
        {provider} to {sanction}.
        """,
    "warranty": """
        {provider} warrants the goods against defects for {months}, and the remedy of {recipient} is {remedy}.

        During a warranty period of {months}, {provider} shall answer for any faulty item by {remedy}.

        Should a product prove defective within {months} after handover, {recipient} is entitled to {remedy}.

        The guarantee given by {provider} lasts {months} and consists in {remedy}.
        """,
    "force-majeure": """
        After {days} of delay caused by events beyond control, the consequence is {relief}; the duty to pay
        [pay: is suspended | is not suspended].

        An event of force majeure that continues for {days} leads to {relief}; payment obligations are [pay: excused | not
        excused] meanwhile.

        War, flood, epidemic and similar events release a party, [pay: even from payment | except from payment], and
        justify {relief} once they have lasted {days}.

        An impediment of {days} through unforeseeable circumstances gives rise to {relief}, and money owed [pay: need not |
        must still] be paid on time.
        """,
    "assignment": """
        {provider} may assign {agreement} to {assignee} [consent: only with | even without] the prior consent of
        {recipient}, informed {days} beforehand.

        A transfer of {agreement} to {assignee} [consent: requires | does not require] approval and must be announced at
        least {days} ahead.

        {provider} is [consent: not free | free] to make over its rights to {assignee} without asking, and gives an advance
        notice of {days}.

        Subject to a notice of {days}, {agreement} can be handed on to {assignee} [consent: if the other party agrees |
        even if the other party disagrees].
        """,
    "non-compete": """
        For {months} after the end of {agreement}, {provider} [ban: shall refrain from | remains free to start] {activity}.

        Once {agreement} is terminated, {activity} is [ban: forbidden | permitted] to {provider} for {months}.

        Until {months} have passed, {provider} [ban: agrees not to engage | is allowed to engage] in {activity}.

        The restraint of trade accepted by {provider} runs for {months} and [ban: extends | does not extend] to {activity}.
        """,
    "data-protection": """
        {provider} shall report a personal data breach within {hours}, [abroad: may | may not] transfer data abroad, and
        shall {disposal} at the end.

        Security incidents must be notified within {hours}; processing outside the country is [abroad: permitted |
        prohibited]; on termination {provider} has to {disposal}.

        As processor, {provider} announces a data leak inside {hours}, is [abroad: authorised | not authorised] to export
        personal data, and will finally {disposal}.

        Personal data [abroad: can | cannot] be stored in foreign countries; {provider} must warn of a breach in {hours} and
        {disposal} after processing.
        """,
    "intellectual-property": """
        Intellectual property in {work} shall vest in {provider}, and {recipient} receives [licence: an exclusive | a
        non-exclusive] licence for {place}.

        {provider} owns every right in {work}, while {recipient} is granted a licence for {place} that is
        [licence: exclusive | not exclusive].

        Title to {work} belongs to {provider}; {recipient} may exploit it in {place}, [licence: to the exclusion of everyone
        else | alongside other licensees].

        Ownership of {work} stays with {provider}. In {place}, {recipient} enjoys [licence: a sole right | a shared right] of
        use.
        """,
    "audit-rights": """
        On written notice of {days}, {recipient} may audit {subject}, and the cost shall be borne by [cost: {provider} |
        {recipient}].

        {recipient} is entitled to inspect {subject}, having given notice of {days}; [cost: {provider} | {recipient}] pays
        for the inspection.

        {provider} shall open {subject} to an auditor {days} after notice; the auditor's fees fall on [cost: {provider} |
        {recipient}].

        An examination of {subject} at the expense of [cost: {provider} | {recipient}] is possible whenever it was announced
        {days} before.
        """,
    "renewal": """
        On expiry of the initial term, {agreement} shall renew [mode: automatically | only by written agreement] for
        {months} with {price}.

        {agreement} is extended by {months} at {price} [mode: unless a party objects | if both parties sign] before the term
        runs out.

        The term is prolonged for {months} at a time, on the basis of {price}, [mode: without further action | by express
        consent alone].

        Renewal for {months} happens [mode: by itself | by joint decision] at the end of the current term and brings
        {price}.
        """,
}

TRAINING = Part(
    texts=_TEXTS,
    values={
        "days": (5, 7, 10, 14, 20, 30, 42, 60, 90, 120),
        "hours": (6, 10, 12, 20, 24, 36, 50, 60, 72, 90),
        "months": (2, 3, 6, 10, 12, 20, 24, 30, 36, 60),
        "percent": (2, 3, 5, 6, 7, 10, 12, 14, 20, 24),
        "years": (2, 3, 5, 6, 7, 10, 12, 14, 20, 30),
        "amount": (50_000, 100_000, 120_000, 200_000, 350_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 7_000_000),
        "place": (
            *("California", "England", "Germany", "Ireland", "Italy", "Japan", "New York", "Ontario", "Singapore"),
            "Switzerland",
        ),
        "due": (
            "the fees for work already done | remuneration of services performed to date | the price of what has been completed",
            "reimbursement of expenses | the out-of-pocket costs | compensation for outlays",
            "a fixed termination fee | a break fee | a lump sum for early exit",
            "no compensation | nothing at all | no payment whatsoever",
        ),
        "breach": (
            "a failure to pay | an overdue invoice | non-payment of the price",
            "late delivery | a missed delivery date | delay in supplying",
            "the delivery of defective goods | work of poor quality | a failure to meet the specification",
            "disclosure of confidential information | a breach of secrecy | a leak of trade secrets",
        ),
        "confidant": (
            "affiliates | companies of the same group | parent and sister companies",
            "lawyers and auditors | professional advisers | legal and tax counsel",
            "subcontractors | suppliers that help to perform | third parties hired for the work",
            "courts and public authorities | regulators | government agencies",
        ),
        "loss": (
            "loss of profit | loss of earnings | missed revenue",
            "loss of data | corruption of files | destruction of records",
            "loss of goodwill | damage to reputation | harm to the brand",
            "business interruption | loss of production | downtime",
        ),
        "claim": (
            "infringement of intellectual property | infringed patents or copyrights | the use of protected rights of others",
            "bodily injury | personal injury or death | physical harm to persons",
            "a violation of applicable law | a breach of statutory rules | unlawful conduct",
            "wages owed to employees | complaints of its own staff | unpaid salaries",
        ),
        "forum": (
            "the state courts | the ordinary courts | the judges of the competent court",
            "arbitration | an arbitral tribunal | a panel of arbitrators",
            "mediation | a neutral mediator | conciliation",
            "an independent expert | expert determination | a technical expert",
        ),
        "trigger": (
            "receipt of the invoice | arrival of the bill | the invoice date",
            "delivery of the goods | arrival of the shipment | handover of the goods",
            "acceptance of the work | a successful acceptance test | written approval of the result",
            "the end of the month | the last day of the calendar month | month-end",
        ),
        "sanction": (
            "suspend its services | stop further deliveries | interrupt performance",
            "claim collection costs | charge reminder fees | recover legal expenses",
            "demand all outstanding sums at once | accelerate the whole debt | call in every open invoice",
            "cancel agreed discounts | withdraw rebates | revoke price reductions",
        ),
        "remedy": (
            "repair of the goods | the mending of defects | correction of the fault",
            "replacement | delivery of a new item | exchange of the goods",
            "a refund of the price | repayment of the purchase price | return of its money",
            "a price reduction | a lower price | a discount on the price",
        ),
        "relief": (
            "more time to perform | an extension of deadlines | a later delivery date",
            "termination of the contract | cancellation | a right to withdraw",
            "renegotiation of the terms | talks on an adjustment | an amendment in good faith",
            "purchases from another supplier | a substitute source | procurement elsewhere",
        ),
        "assignee": (
            "an affiliate | a company of the same group | a subsidiary",
            "a buyer of the whole business | the successor in a merger | the acquirer of its assets",
            "a bank as security | a lender | a financing institution",
            "a competitor | a rival firm | a company in the same market",
        ),
        "activity": (
            "running a competing business | offering rival services | working for a competitor",
            "hiring employees | soliciting staff | recruiting personnel",
            "approaching customers | soliciting clients | diverting orders of buyers",
            "buying shares in a competitor | investing in a rival | holding a stake in a competing company",
        ),
        "disposal": (
            "return the data | hand the data back | send all copies back",
            "delete the data | erase every copy | destroy the data",
            "anonymise the data | remove all names from the data | make the persons unidentifiable",
            "archive the data | keep the data in secure storage | retain a locked copy",
        ),
        "work": (
            "the software | the source code | the computer programs",
            "inventions and patents | patentable results | technical inventions",
            "the trade marks | brand names and logos | the trade name",
            "reports and drawings | the written documents | plans and manuals",
        ),
        "subject": (
            "the books and accounts | financial records | invoices and ledgers",
            "IT security | the computer systems | cyber safeguards",
            "the premises | the factories | production sites",
            "labour conditions | the treatment of workers | employment standards",
        ),
        "price": (
            "unchanged prices | the same rates | the current fees",
            "prices adjusted to inflation | index-linked rates | fees that follow the consumer price index",
            "a loyalty discount | reduced prices | cheaper rates",
            "newly negotiated prices | rates to be agreed afresh | fees subject to negotiation",
        ),
    },
    roles=(
        ("the Supplier", "the Customer"),
        ("the Provider", "the Client"),
        ("the Seller", "the Buyer"),
        ("the Manufacturer", "the Distributor"),
    ),
    agreements=("this Agreement", "this Contract"),
)
