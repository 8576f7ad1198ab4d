"""Opinions: what is said of whom, when and how; and an alert when the negative ones surge.

tables     the rows: documents, stories, series, alerts, deliveries
stories    near duplicates of one text, by MinHash
store      documents into the database, once each; counts out of it
detect     counts → surges: robust z-score over a seasonal baseline, and CUSUM; knows no database
watch      what changed → detect → alerts, each once, however many look
webhooks   alerts → signed requests, until they are taken
lease      one process of several does the watching
"""
