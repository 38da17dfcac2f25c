"""Wordings of contract clauses for the demo's test data, none of which the training data uses."""

from common.data.demo_clauses import Part

_TEXTS = {
    "termination-for-convenience": """
        [who: Both parties have | {recipient}, and no one else, has | {provider}, and no one else, has] the option to end
        {agreement} early without giving grounds, provided that written notice is served at least {days} in advance;
        fees accrued until then [pay: stay due | are waived].

        Upon serving {days} written notice, {agreement} may be discontinued at the election of [who: any party |
        {recipient} only | {provider} only] even where no default has occurred, [pay: with | but without] payment
        for whatever has been performed.

        No cause is needed for [who: one party or the other | {recipient}, unlike {provider}, | {provider}, unlike
        {recipient},] to terminate {agreement} on notice of {days}, and completed work [pay: must | need not]
        be remunerated.
        """,
    "termination-for-breach": """
        Where [who: {provider} | {recipient}] is in substantial breach and has not corrected it {days} after being
        notified, {agreement} may be terminated forthwith by its counterparty, [refund: who recovers |
        who does not recover] the unused part of any prepayment.

        Should a serious violation of {agreement} by [who: {provider} | {recipient}] persist for {days} despite a warning
        in writing, the injured party is free to terminate, and money received up front [refund: has to be given back |
        does not have to be given back].

        [who: {provider} | {recipient}] has {days} from notification to cure a fundamental default, failing which
        {agreement} can be cancelled by the aggrieved party, [refund: with reimbursement | without reimbursement]
        of charges prepaid.
        """,
    "confidentiality": """
        Secrets learned from the counterparty shall be guarded [who: by both of the parties | by {recipient} |
        by {provider}] until {years} have elapsed since {agreement} ended, and their release to associated companies
        is [affiliates: acceptable | unacceptable].

        [who: The parties mutually promise | {recipient} promises | {provider} promises] to treat the other's proprietary
        information as confidential for {years} beyond the term of {agreement}, [affiliates: save that | and not even]
        affiliated entities may see it.

        Non-public information exchanged under {agreement} stays protected for a further {years}; [who: either party |
        {recipient} | {provider}], as receiving party, is [affiliates: at liberty | not at liberty] to pass it
        to members of its group.
        """,
    "limitation-of-liability": """
        {provider}'s aggregate responsibility for all claims is restricted to {amount}, indirect losses
        [indirect: being recoverable within that figure | not being recoverable at all]; the restriction
        [gross: holds | does not hold] if {provider} was grossly negligent.

        Under {agreement}, {recipient} can recover at most {amount} from {provider}, [indirect: inclusive | exclusive] of
        lost earnings and consequential harm, and [gross: even | except] where there was gross negligence.

        The upper limit on what {provider} owes in damages is {amount}. Consequential loss [indirect: is | is not]
        compensated, and gross negligence [gross: does not remove | removes] this limit.
        """,
    "indemnification": """
        [who: {provider} | {recipient}] agrees to keep its counterparty indemnified, for a sum not above {amount}, from
        demands of third parties based on [cause: infringing copyright, patents or trade marks | physical injury or
        destroyed property | contravention of legislation].

        Claims by outsiders that stem from [cause: a violation of intellectual property | injured persons or damaged
        property | illegal acts] shall be met by [who: {provider} | {recipient}], which saves the opposite party
        harmless in an amount of no more than {amount}.

        Up to a limit of {amount}, the costs of legal proceedings over [cause: alleged patent or copyright infringement |
        wounds to people or harm to belongings | failure to obey the law] are for the account of
        [who: {provider} | {recipient}], who shall protect the opposing party.
        """,
    "governing-law": """
        {agreement} is to be construed in accordance with the legal system of {place}; the parties will have any conflict
        resolved [forum: in court | through arbitration], and the treaty on international sale contracts
        [convention: shall be observed | shall be disregarded].

        All questions concerning {agreement} are subject to {place} law [convention: together with | but without] the
        international sales convention, and lawsuits are [forum: heard by public judges | replaced by binding
        arbitration].

        [forum: Judicial proceedings | Arbitral proceedings] are the only means of resolving disputes under {agreement},
        to which the rules of {place} apply, the United Nations convention on sales being
        [convention: part of them | set aside].
        """,
    "payment-terms": """
        Every invoice must be settled by {recipient} not later than {days} following [start: its receipt | delivery of
        what was ordered]; {recipient} [setoff: retains | waives] the right of set-off.

        {recipient} has {days} to pay, starting when [start: the invoice reaches it | the goods reach it], and is
        [setoff: free | forbidden] to deduct amounts which {provider} owes to it.

        Invoiced sums become payable on expiry of {days} after [start: the bill comes in | the shipment comes in], and
        counterclaims [setoff: can be | cannot be] netted against them.
        """,
    "late-payment-interest": """
        On every late payment {recipient} owes interest at an annual rate of {percent}, running from [start: the agreed
        date of payment | the dispatch of a reminder letter], and {provider} [suspend: can | cannot] interrupt its
        work as long as the debt is open.

        Amounts unpaid attract {percent} interest per year with effect from [start: their due day | a written dunning
        notice]; {provider} is [suspend: at liberty | obliged not] to withhold performance because of the delay.

        Delay in payment costs {recipient} {percent} a year, the interest starting [start: on the contractual payment day |
        upon a warning in writing], and it [suspend: justifies | does not justify] a suspension of supplies.
        """,
    "warranty": """
        For {months} following delivery {provider} guarantees freedom from defects, failing which it will [remedy: rectify
        or replace the goods | refund what was paid]; warranties implied by law are [implied: maintained | ruled out].

        If a fault appears before {months} are over, {provider} must [remedy: repair the article or supply a new one |
        give {recipient} its money back]. Implied conditions of fitness [implied: continue to apply | have no effect].

        {recipient} may demand [remedy: correction or exchange | repayment of the purchase price] for defects
        discovered in the first {months}, and this warranty [implied: stands beside | supersedes] those which
        statute implies.
        """,
    "force-majeure": """
        No party answers for a failure due to natural disaster, strike or government action, [pay: not even a failure |
        save for a failure] to pay; when the obstacle persists beyond {days}, [end: both sides are | the unhindered
        side is] entitled to terminate {agreement}.

        Events outside a party's reasonable control excuse it from performing [pay: as well as from paying | but not from
        paying], and if they go on for {days}, {agreement} may be brought to a close by [end: whichever party wishes |
        the one that is not prevented].

        A force majeure situation exceeding {days} allows [end: one or the other party | solely the party that it does
        not hinder] to withdraw from {agreement}, and sums payable [pay: are deferred | fall due as usual] during
        that situation.
        """,
    "assignment": """
        Assignment of {agreement} by [who: {provider} | {recipient}] is [consent: valid only if | valid even if not]
        approved by its counterparty, who is to be told of it {days} in advance.

        Giving notice of {days}, [who: {provider} | {recipient}] can transfer its position in {agreement} to someone else,
        [consent: on condition that | irrespective of whether] its counterparty consents.

        [who: {provider} | {recipient}] [consent: needs | does not need] permission from its counterparty in order to cede
        {agreement} to a new party, and shall notify the cession {days} earlier.
        """,
    "non-compete": """
        {provider} must stay out of {recipient}'s line of business in {place} for {months} once {agreement} is over,
        [staff: though it may | and it must not] employ people who work for {recipient}.

        No competing activity in {place} is open to {provider} for a term of {months} from the close of {agreement};
        poaching of employees is [staff: exempt from | included in] this covenant.

        During the {months} that follow {agreement}, {provider} abstains from rivalry with {recipient} in {place}, and
        [staff: can | cannot] seek to engage its workforce.
        """,
    "data-protection": """
        A breach of personal data is to be communicated to {recipient} in not more than {hours}; moving the data to other
        countries is [transfer: admissible | inadmissible], and {provider} finally [end: restores them to |
        purges them for] {recipient}.

        {provider} has {hours} to tell {recipient} about a loss of personal information, [transfer: is allowed |
        is not allowed] to send it across the border, and when the services are finished shall
        [end: give it back | remove it permanently].

        Cross-border transfer of personal data is [transfer: open | closed] to {provider}, which alerts {recipient} to an
        incident within {hours} and afterwards arranges for [end: the return | the deletion] of all records.
        """,
    "intellectual-property": """
        [owner: {provider} | {recipient}] is the proprietor of all results and of the rights in them; its counterparty
        obtains for {place} a right of use which is [licence: exclusive | simple and not exclusive].

        Copyright and patents that emerge from {agreement} are the property of [owner: {provider} | {recipient}], who
        licenses them in {place} to the counterparty [licence: and nobody else | and to whomever else it pleases].

        The counterparty may use in {place}, under [licence: an exclusive licence | a licence that is non-exclusive],
        whatever was developed here, the ownership of which lies with [owner: {provider} | {recipient}].
        """,
    "audit-rights": """
        {recipient} can have {provider}'s documentation reviewed [often: one time | two times] per year if it says so
        {days} earlier, the expense being carried by [cost: {provider} | {recipient}].

        {provider} tolerates [often: a yearly audit | an audit every six-month period] of its accounts by {recipient}
        upon {days} warning, the price of which [cost: {provider} | {recipient}] has to pay.

        Access to the ledgers of {provider} is given to {recipient} [often: once | twice] annually following a request made
        {days} previously, and [cost: {provider} | {recipient}] meets the auditing charges.
        """,
    "renewal": """
        When its term is over, {agreement} continues for another {months} [mode: of its own accord | solely on the basis of
        a signed extension], at [price: prices as before | prices to be fixed anew].

        {agreement} will be renewed for {months} [mode: without any declaration being necessary | by mutual declaration
        in writing], the remuneration [price: being carried over | being renegotiated].

        An extension of {months} comes about [mode: automatically | through the agreement of both sides], and during it
        the tariff [price: is frozen | may change].
        """,
}

TEST = Part(
    texts=_TEXTS,
    values={
        "amount": (75_000, 150_000, 300_000, 400_000, 600_000, 750_000, 900_000, 1_500_000, 2_500_000, 4_000_000),
        "days": (8, 15, 18, 25, 28, 40, 45, 75, 100, 150),
        "hours": (4, 8, 16, 18, 28, 32, 40, 48, 54, 100),
        "months": (4, 8, 9, 11, 15, 16, 18, 27, 48, 54),
        "percent": (4, 8, 9, 11, 13, 15, 16, 17, 18, 19),
        "place": (
            *("Belgium", "Brazil", "Delaware", "France", "Hong Kong", "the Netherlands", "Scotland", "Sweden"),
            *("Texas", "Victoria"),
        ),
        "years": (4, 8, 9, 11, 13, 15, 16, 17, 18, 25),
    },
    roles=(
        ("the Vendor", "the Purchaser"),
        ("the Contractor", "the Principal"),
        ("the Operator", "the Subscriber"),
    ),
    agreements=("this Deed", "this Instrument"),
)
