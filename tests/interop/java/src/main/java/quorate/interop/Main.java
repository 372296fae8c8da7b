package quorate.interop;

import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.rocketmq.client.QueryResult;
import org.apache.rocketmq.client.consumer.DefaultMQPushConsumer;
import org.apache.rocketmq.client.consumer.listener.ConsumeConcurrentlyStatus;
import org.apache.rocketmq.client.consumer.listener.ConsumeOrderlyStatus;
import org.apache.rocketmq.client.consumer.listener.MessageListenerConcurrently;
import org.apache.rocketmq.client.consumer.listener.MessageListenerOrderly;
import org.apache.rocketmq.client.exception.MQClientException;
import org.apache.rocketmq.client.producer.DefaultMQProducer;
import org.apache.rocketmq.client.producer.SendCallback;
import org.apache.rocketmq.client.producer.SendResult;
import org.apache.rocketmq.client.producer.SendStatus;
import org.apache.rocketmq.common.consumer.ConsumeFromWhere;
import org.apache.rocketmq.common.message.Message;
import org.apache.rocketmq.common.message.MessageConst;
import org.apache.rocketmq.common.message.MessageExt;

/**
 * What a user of the stock Java client does, one scenario after another, a few at a time.
 *
 * <p>Arguments: name server, a word that makes topics and groups unique, and the scenarios (all if none is named). Prints one
 * JSON line for each and exits with 1 when one failed. Every scenario has topics, groups and a client of its own.
 */
public final class Main {
    private static final long PATIENCE_S = 60;

    private final String namesrv;
    private final String suffix;

    private Main(String namesrv, String suffix) {
        this.namesrv = namesrv;
        this.suffix = suffix;
    }

    private interface Scenario {
        String run() throws Exception;
    }

    public static void main(String[] args) throws Exception {
        Main main = new Main(args[0], args[1]);
        Map<String, Scenario> scenarios = new LinkedHashMap<>();
        // The slow one first, so that the others fill its waiting time.
        scenarios.put("retry_dlq", main::retryThenDeadLetter);
        scenarios.put("sync", main::sync);
        scenarios.put("async", main::async);
        scenarios.put("oneway", main::oneway);
        scenarios.put("batch", main::batch);
        scenarios.put("ordered", main::ordered);
        scenarios.put("tag", main::tagFilter);
        scenarios.put("query", main::query);
        scenarios.put("large", main::largeBody);
        scenarios.put("offsets", main::offsetsSurviveConsumer);
        List<String> chosen =
            args.length > 2 ? Arrays.asList(args).subList(2, args.length) : new ArrayList<>(scenarios.keySet());
        AtomicInteger failures = new AtomicInteger();
        ExecutorService pool = Executors.newFixedThreadPool(4);
        for (String name : chosen) {
            Scenario scenario = scenarios.get(name);
            if (scenario == null) {
                Report.line(name, false, 0, "no such scenario");
                failures.incrementAndGet();
                continue;
            }
            pool.execute(() -> {
                long begin = System.currentTimeMillis();
                try {
                    String detail = scenario.run();
                    Report.line(name, true, System.currentTimeMillis() - begin, detail);
                } catch (Exception | AssertionError error) {
                    failures.incrementAndGet();
                    Report.line(name, false, System.currentTimeMillis() - begin, String.valueOf(error));
                    error.printStackTrace();
                }
            });
        }
        pool.shutdown();
        if (!pool.awaitTermination(150, TimeUnit.SECONDS)) {
            Report.line("all", false, 150_000, "scenarios still running after 150 s");
            failures.incrementAndGet();
        }
        // Client threads of a failed scenario may still be there.
        System.exit(failures.get() == 0 ? 0 : 1);
    }

    // Scenarios.

    private String sync() throws Exception {
        String topic = topic("sync");
        DefaultMQProducer producer = producer("sync");
        Inbox inbox = new Inbox();
        DefaultMQPushConsumer consumer = null;
        try {
            Set<String> sent = new TreeSet<>();
            Set<Integer> queues = new TreeSet<>();
            for (int i = 0; i < 20; i++) {
                Message message = message(topic, "", "k" + i, "sync-" + i);
                message.putUserProperty("colour", "blue \u00e9");
                SendResult result = producer.send(message);
                check(result.getSendStatus() == SendStatus.SEND_OK, "status " + result.getSendStatus());
                check(result.getOffsetMsgId() != null && result.getOffsetMsgId().length() == 32, "offset message id");
                check(result.getMsgId().equals(message.getProperty(MessageConst.PROPERTY_UNIQ_CLIENT_MESSAGE_ID_KEYIDX)),
                    "message id is not the unique key");
                queues.add(result.getMessageQueue().getQueueId());
                sent.add("sync-" + i);
            }
            check(queues.size() == 4, "an automatic topic has 4 queues, used " + queues);
            consumer = consumer("sync", topic, "*");
            consumer.registerMessageListener(concurrently(inbox));
            consumer.start();
            inbox.await(sent, PATIENCE_S);
            for (MessageExt message : inbox.all()) {
                check("blue \u00e9".equals(message.getUserProperty("colour")), "user property " + message.getProperties());
                check(message.getKeys().equals("k" + Inbox.body(message).substring(5)), "key " + message.getKeys());
                check(message.getReconsumeTimes() == 0, "delivered again");
            }
            check(inbox.all().size() == 20, "delivered " + inbox.all().size() + " times");
            return "20 sent and consumed over " + queues.size() + " queues";
        } finally {
            shutdown(producer, consumer);
        }
    }

    private String async() throws Exception {
        String topic = topic("async");
        DefaultMQProducer producer = producer("async");
        DefaultMQPushConsumer consumer = null;
        try {
            int count = 100;
            CountDownLatch answered = new CountDownLatch(count);
            AtomicReference<Throwable> failure = new AtomicReference<>();
            Set<String> sent = ConcurrentHashMap.newKeySet();
            producer.send(message(topic, "", "", "async-first"));
            for (int i = 0; i < count; i++) {
                String body = "async-" + i;
                producer.send(message(topic, "", "", body), new SendCallback() {
                    @Override
                    public void onSuccess(SendResult result) {
                        if (result.getSendStatus() == SendStatus.SEND_OK) {
                            sent.add(body);
                        }
                        answered.countDown();
                    }

                    @Override
                    public void onException(Throwable error) {
                        failure.set(error);
                        answered.countDown();
                    }
                }, 10_000);
            }
            check(answered.await(PATIENCE_S, TimeUnit.SECONDS), "callbacks missing: " + answered.getCount());
            check(failure.get() == null, "a send failed: " + failure.get());
            check(sent.size() == count, "accepted " + sent.size());
            Inbox inbox = new Inbox();
            consumer = consumer("async", topic, "*");
            consumer.registerMessageListener(concurrently(inbox));
            consumer.start();
            inbox.await(new TreeSet<>(sent), PATIENCE_S);
            return count + " callbacks, all consumed";
        } finally {
            shutdown(producer, consumer);
        }
    }

    private String oneway() throws Exception {
        String topic = topic("oneway");
        DefaultMQProducer producer = producer("oneway");
        DefaultMQPushConsumer consumer = null;
        try {
            producer.send(message(topic, "", "", "oneway-first"));
            Inbox inbox = new Inbox();
            consumer = consumer("oneway", topic, "*");
            consumer.registerMessageListener(concurrently(inbox));
            consumer.start();
            Set<String> sent = new TreeSet<>();
            for (int i = 0; i < 20; i++) {
                producer.sendOneway(message(topic, "", "", "oneway-" + i));
                sent.add("oneway-" + i);
            }
            inbox.await(sent, PATIENCE_S);
            return "20 arrived";
        } finally {
            shutdown(producer, consumer);
        }
    }

    private String batch() throws Exception {
        String topic = topic("batch");
        DefaultMQProducer producer = producer("batch");
        DefaultMQPushConsumer consumer = null;
        try {
            producer.send(message(topic, "", "", "batch-first"));
            List<Message> messages = new ArrayList<>();
            Set<String> sent = new TreeSet<>();
            for (int i = 0; i < 32; i++) {
                messages.add(message(topic, i % 2 == 0 ? "even" : "odd", "b" + i, "batch-" + i));
                sent.add("batch-" + i);
            }
            SendResult result = producer.send(messages);
            check(result.getSendStatus() == SendStatus.SEND_OK, "status " + result.getSendStatus());
            check(result.getOffsetMsgId().split(",").length == 32, "one offset message id for each message: " + result);
            Inbox inbox = new Inbox();
            consumer = consumer("batch", topic, "*");
            consumer.registerMessageListener(concurrently(inbox));
            consumer.start();
            inbox.await(sent, PATIENCE_S);
            Map<String, Long> offsets = new HashMap<>();
            Set<String> offsetIds = new TreeSet<>(Arrays.asList(result.getOffsetMsgId().split(",")));
            for (MessageExt message : inbox.all()) {
                String body = Inbox.body(message);
                if (body.equals("batch-first")) {
                    continue;
                }
                offsets.put(body, message.getQueueOffset());
                int number = Integer.parseInt(body.substring(6));
                check(message.getTags().equals(number % 2 == 0 ? "even" : "odd"), "tag of " + body);
                check(offsetIds.contains(offsetId(message)), "offset message id of " + body + " was not answered");
            }
            for (int i = 1; i < 32; i++) {
                check(offsets.get("batch-" + i) == offsets.get("batch-" + (i - 1)) + 1, "queue offsets " + offsets);
            }
            check(offsets.get("batch-0") == result.getQueueOffset(), "answered offset is not the first message's");
            return "32 in one request, offsets in order";
        } finally {
            shutdown(producer, consumer);
        }
    }

    private String ordered() throws Exception {
        String topic = topic("ordered");
        DefaultMQProducer producer = producer("ordered");
        DefaultMQPushConsumer consumer = null;
        try {
            producer.send(message(topic, "", "", "first"));
            Inbox inbox = new Inbox();
            AtomicInteger refusals = new AtomicInteger();
            consumer = consumer("ordered", topic, "order");
            consumer.registerMessageListener((MessageListenerOrderly) (messages, context) -> {
                // The queue has to wait for this one; nothing behind it may overtake.
                if (Inbox.body(messages.get(0)).equals("2-5") && refusals.getAndIncrement() < 2) {
                    context.setSuspendCurrentQueueTimeMillis(200);
                    return ConsumeOrderlyStatus.SUSPEND_CURRENT_QUEUE_A_MOMENT;
                }
                inbox.add(messages);
                return ConsumeOrderlyStatus.SUCCESS;
            });
            consumer.start();
            Set<String> sent = new TreeSet<>();
            for (int i = 0; i < 10; i++) {
                for (int order = 0; order < 5; order++) {
                    String body = order + "-" + i;
                    SendResult result = producer.send(
                        message(topic, "order", "", body),
                        (queues, given, argument) -> queues.get((Integer) argument % queues.size()),
                        order);
                    check(result.getSendStatus() == SendStatus.SEND_OK, "status " + result.getSendStatus());
                    sent.add(body);
                }
            }
            inbox.await(sent, PATIENCE_S);
            Map<String, Integer> last = new HashMap<>();
            for (MessageExt message : inbox.all()) {
                String[] parts = Inbox.body(message).split("-");
                int number = Integer.parseInt(parts[1]);
                int expected = last.getOrDefault(parts[0], -1) + 1;
                check(number == expected, "order " + parts[0] + ": " + number + " where " + expected + " was due");
                last.put(parts[0], number);
            }
            check(refusals.get() == 3, "refused message came " + refusals.get() + " times");
            return "5 orders of 10 steps in order, one queue held back twice";
        } finally {
            shutdown(producer, consumer);
        }
    }

    private String tagFilter() throws Exception {
        String topic = topic("tag");
        DefaultMQProducer producer = producer("tag");
        DefaultMQPushConsumer consumer = null;
        DefaultMQPushConsumer single = null;
        try {
            Set<String> wanted = new TreeSet<>();
            String[] tags = {"new", "paid", "sent", "Aa", "BB"};
            for (int i = 0; i < 25; i++) {
                String tag = tags[i % tags.length];
                producer.send(message(topic, tag, "", tag + "-" + i));
                if (tag.equals("new") || tag.equals("paid")) {
                    wanted.add(tag + "-" + i);
                }
            }
            Inbox inbox = new Inbox();
            consumer = consumer("tag", topic, "new || paid");
            consumer.registerMessageListener(concurrently(inbox));
            consumer.start();
            // "Aa" and "BB" have the same Java hash, so only the tag itself tells them apart.
            Inbox collided = new Inbox();
            single = consumer("tag_single", topic, "Aa");
            single.registerMessageListener(concurrently(collided));
            single.start();
            inbox.await(wanted, PATIENCE_S);
            collided.await(new TreeSet<>(Arrays.asList("Aa-3", "Aa-8", "Aa-13", "Aa-18", "Aa-23")), PATIENCE_S);
            Thread.sleep(500);
            check(inbox.bodies().equals(wanted), "filtered " + inbox.bodies());
            check(collided.bodies().size() == 5, "same hash, other tag: " + collided.bodies());
            return "10 of 25 by two tags, 5 by one";
        } finally {
            shutdown(producer, consumer, single);
        }
    }

    private String retryThenDeadLetter() throws Exception {
        String topic = topic("retry");
        DefaultMQProducer producer = producer("retry");
        DefaultMQPushConsumer consumer = null;
        DefaultMQPushConsumer dead = null;
        try {
            SendResult good = producer.send(message(topic, "", "g", "good"));
            SendResult bad = producer.send(message(topic, "poison", "p", "bad"));
            check(good.getSendStatus() == SendStatus.SEND_OK, "status " + good.getSendStatus());
            Inbox inbox = new Inbox();
            List<Integer> attempts = new ArrayList<>();
            consumer = consumer("retry", topic, "*");
            consumer.setMaxReconsumeTimes(1);
            consumer.registerMessageListener((MessageListenerConcurrently) (messages, context) -> {
                MessageExt message = messages.get(0);
                if (Inbox.body(message).equals("bad")) {
                    synchronized (attempts) {
                        attempts.add(message.getReconsumeTimes());
                    }
                    context.setDelayLevelWhenNextConsume(1);
                    inbox.add(messages);
                    return ConsumeConcurrentlyStatus.RECONSUME_LATER;
                }
                inbox.add(messages);
                return ConsumeConcurrentlyStatus.CONSUME_SUCCESS;
            });
            consumer.start();
            inbox.await(new TreeSet<>(Arrays.asList("good", "bad")), PATIENCE_S);
            String deadTopic = "%DLQ%" + consumer.getConsumerGroup();
            Inbox deadInbox = new Inbox();
            dead = consumer("retry_dead", deadTopic, "*");
            dead.registerMessageListener(concurrently(deadInbox));
            dead.start();
            deadInbox.await(new TreeSet<>(Arrays.asList("bad")), PATIENCE_S + 40);
            synchronized (attempts) {
                check(attempts.equals(Arrays.asList(0, 1)), "reconsume times " + attempts);
            }
            MessageExt buried = deadInbox.all().get(0);
            check(topic.equals(buried.getProperty("DLQ_ORIGIN_TOPIC")) || topic.equals(buried.getProperty("RETRY_TOPIC")),
                "dead letter's origin " + buried.getProperties());
            check("poison".equals(buried.getTags()) && "p".equals(buried.getKeys()), "tag and key " + buried.getProperties());
            check(bad.getMsgId().equals(buried.getMsgId()), "unique key of the dead letter " + buried.getMsgId());
            for (MessageExt message : inbox.all()) {
                check(message.getTopic().equals(topic), "topic of the redelivery " + message.getTopic());
            }
            return "one retry, then " + deadTopic;
        } finally {
            shutdown(producer, consumer, dead);
        }
    }

    private String query() throws Exception {
        String topic = topic("query");
        DefaultMQProducer producer = producer("query");
        try {
            long begin = System.currentTimeMillis();
            SendResult result = null;
            for (int i = 0; i < 8; i++) {
                SendResult one = producer.send(message(topic, "t", "order-" + i + " shared", "query-" + i));
                result = i == 3 ? one : result;
            }
            String offsetId = result.getOffsetMsgId();
            MessageExt viewed = producer.viewMessage(topic, offsetId);
            check(Inbox.body(viewed).equals("query-3"), "by offset id " + viewed);
            MessageExt byUnique = eventually(() -> producer.viewMessage(topic, resultId(topic, producer, "order-3")));
            check(Inbox.body(byUnique).equals("query-3"), "by unique key " + byUnique);
            QueryResult single = eventually(() -> producer.queryMessage(topic, "order-5", 32, begin - 5_000, begin + 600_000));
            check(single.getMessageList().size() == 1, "by key " + single.getMessageList().size());
            check(Inbox.body(single.getMessageList().get(0)).equals("query-5"), "by key " + single);
            QueryResult shared = eventually(() -> {
                QueryResult found = producer.queryMessage(topic, "shared", 32, begin - 5_000, begin + 600_000);
                return found.getMessageList().size() < 8 ? null : found;
            });
            check(shared.getMessageList().size() == 8, "shared key " + shared.getMessageList().size());
            String none = "";
            try {
                producer.queryMessage(topic, "nobody", 32, begin - 5_000, begin + 600_000);
            } catch (MQClientException expected) {
                none = "unknown key refused";
            }
            check(!none.isEmpty(), "an unknown key found something");
            return "by offset id, unique key, key, shared key; " + none;
        } finally {
            shutdown(producer);
        }
    }

    private String largeBody() throws Exception {
        String topic = topic("large");
        DefaultMQProducer producer = producer("large");
        DefaultMQPushConsumer consumer = null;
        try {
            StringBuilder text = new StringBuilder();
            while (text.length() < 300_000) {
                text.append("line ").append(text.length()).append('\n');
            }
            // Above 4 KiB the client compresses, below the limit the broker takes it whole.
            producer.send(message(topic, "", "", text.toString()));
            producer.setCompressMsgBodyOverHowmuch(Integer.MAX_VALUE);
            producer.send(message(topic, "", "", "plain " + text));
            boolean refused = false;
            producer.setMaxMessageSize(8 * 1024 * 1024);
            try {
                producer.send(new Message(topic, new byte[5 * 1024 * 1024]));
            } catch (Exception expected) {
                refused = true;
            }
            check(refused, "5 MiB were accepted");
            producer.send(message(topic, "", "", "small"));
            Inbox inbox = new Inbox();
            consumer = consumer("large", topic, "*");
            consumer.registerMessageListener(concurrently(inbox));
            consumer.start();
            inbox.await(new TreeSet<>(Arrays.asList(text.toString(), "plain " + text, "small")), PATIENCE_S);
            return "compressed and plain 300 KB whole, 5 MiB refused, connection usable";
        } finally {
            shutdown(producer, consumer);
        }
    }

    private String offsetsSurviveConsumer() throws Exception {
        String topic = topic("offsets");
        DefaultMQProducer producer = producer("offsets");
        DefaultMQPushConsumer first = null;
        DefaultMQPushConsumer second = null;
        try {
            Set<String> early = new TreeSet<>();
            for (int i = 0; i < 12; i++) {
                producer.send(message(topic, "", "", "early-" + i));
                early.add("early-" + i);
            }
            Inbox firstInbox = new Inbox();
            first = consumer("offsets", topic, "*");
            first.registerMessageListener(concurrently(firstInbox));
            first.start();
            firstInbox.await(early, PATIENCE_S);
            // Give the listener's last acknowledgement time to reach the local offset table; shutdown persists it.
            Thread.sleep(300);
            first.shutdown();
            Set<String> late = new TreeSet<>();
            for (int i = 0; i < 12; i++) {
                producer.send(message(topic, "", "", "late-" + i));
                late.add("late-" + i);
            }
            Inbox secondInbox = new Inbox();
            second = consumer("offsets", topic, "*");
            second.setInstanceName(second.getInstanceName() + "_again");
            second.registerMessageListener(concurrently(secondInbox));
            second.start();
            secondInbox.await(late, PATIENCE_S);
            check(secondInbox.bodies().equals(late), "second consumer got " + secondInbox.bodies());
            return "second consumer began where the first had stopped";
        } finally {
            shutdown(producer, first, second);
        }
    }

    // Helpers.

    private interface Attempt<T> {
        T get() throws Exception;
    }

    /** Apache's key index follows the acknowledgement by some milliseconds, so a query may have to be repeated. */
    private static <T> T eventually(Attempt<T> attempt) throws Exception {
        Exception last = new IllegalStateException("never enough found");
        for (int i = 0; i < 50; i++) {
            try {
                T found = attempt.get();
                if (found != null) {
                    return found;
                }
            } catch (Exception error) {
                last = error;
            }
            Thread.sleep(100);
        }
        throw last;
    }

    private static String resultId(String topic, DefaultMQProducer producer, String key) throws Exception {
        long now = System.currentTimeMillis();
        return producer.queryMessage(topic, key, 1, now - 600_000, now + 600_000).getMessageList().get(0).getMsgId();
    }

    private static String offsetId(MessageExt message) throws Exception {
        java.net.InetSocketAddress host = (java.net.InetSocketAddress) message.getStoreHost();
        StringBuilder text = new StringBuilder();
        for (byte part : host.getAddress().getAddress()) {
            text.append(String.format("%02X", part));
        }
        return text.append(String.format("%08X%016X", host.getPort(), message.getCommitLogOffset())).toString();
    }

    private static MessageListenerConcurrently concurrently(Inbox inbox) {
        return (messages, context) -> {
            inbox.add(messages);
            return ConsumeConcurrentlyStatus.CONSUME_SUCCESS;
        };
    }

    private String topic(String scenario) {
        return "Java_" + scenario + "_" + suffix;
    }

    private static Message message(String topic, String tag, String keys, String body) {
        return new Message(topic, tag, keys, body.getBytes(StandardCharsets.UTF_8));
    }

    private DefaultMQProducer producer(String scenario) throws Exception {
        DefaultMQProducer producer = new DefaultMQProducer("P_java_" + scenario + "_" + suffix);
        producer.setNamesrvAddr(namesrv);
        producer.setInstanceName("p_" + scenario);
        producer.setSendMsgTimeout(10_000);
        producer.start();
        return producer;
    }

    private DefaultMQPushConsumer consumer(String scenario, String topic, String filter) throws Exception {
        DefaultMQPushConsumer consumer = new DefaultMQPushConsumer("C_java_" + scenario + "_" + suffix);
        consumer.setNamesrvAddr(namesrv);
        consumer.setInstanceName("c_" + scenario);
        consumer.setConsumeFromWhere(ConsumeFromWhere.CONSUME_FROM_FIRST_OFFSET);
        // Seconds instead of half a minute until a retry topic's route is seen.
        consumer.setPollNameServerInterval(1_000);
        consumer.setHeartbeatBrokerInterval(2_000);
        consumer.setConsumeThreadMin(2);
        consumer.setConsumeThreadMax(4);
        consumer.subscribe(topic, filter);
        return consumer;
    }

    private static void shutdown(DefaultMQProducer producer, DefaultMQPushConsumer... consumers) {
        producer.shutdown();
        if (consumers == null) {
            return;
        }
        for (DefaultMQPushConsumer consumer : consumers) {
            if (consumer != null) {
                consumer.shutdown();
            }
        }
    }

    private static void check(boolean condition, String otherwise) {
        if (!condition) {
            throw new AssertionError(otherwise);
        }
    }
}
